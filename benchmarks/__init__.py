"""Benchmarks: pyshard beside its peers, interleaved, against the memory bandwidth measured in the same run.

    python -m pytest benchmarks                 # all cases on the CPU, result written to benchmarks/results/
    python -m pytest benchmarks --device cuda   # the same on a GPU, result named after the card
    python -m pytest benchmarks --quick         # seconds: tiny sizes, nothing written; proves that it runs
    python -m benchmarks.report                 # docs/benchmarks.png and benchmarks-distributed.png from results

Each bench_*.py measures one claim. harness.py takes the times, peers.py knows the other libraries,
roofline.py the machine's bandwidth, results.py turns samples into the numbers that are printed and stored.
bench_sharded_*.py train in one process per rank: distributed_ranks.py keeps the processes, distributed_ways.py holds
the ways to train that race in them, and the result goes to a file of its own, <machine>-distributed.json.
"""
