"""Triton kernels of pyshard, one operation per file. Nothing is imported here: Triton is loaded on first use.

Every kernel is launched with enable_fp_fusion=False, so that each operation is rounded on its own, and the
order of all additions is written out. The bits are those of the CPU kernels (csrc/cpu/kernels.cpp).
"""
