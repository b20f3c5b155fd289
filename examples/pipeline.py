"""Pipeline parallel: the blocks of a GPT-2 cut into two stages, trained in the schedule 1F1B.

python -m torch.distributed.run --standalone --nproc-per-node 2 examples/pipeline.py
"""

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

import pyshard


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)  # all ranks build the same model
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 64, "n_layer": 4, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)
    mesh = pyshard.init_mesh(pp=dist.get_world_size())
    pipe = pyshard.pp.pipeline(GPT2LMHeadModel(config), mesh, schedule="1f1b", n_microbatches=4)
    optimizer = pyshard.AdamW(pipe.parameters(), lr=3e-3, max_grad_norm=1.0)  # one norm over all stages
    if dist.get_rank() == 0:
        print(pipe.explain())
    for step in range(30):
        tokens = (torch.arange(32) + torch.randint(64, (8, 1))) % 64  # the same on all ranks
        optimizer.zero_grad()
        loss = pipe.step(tokens, target=tokens).loss
        optimizer.step()
        if step % 10 == 9 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss:.3f}")
    held = sum(p.numel() * p.element_size() for p in pipe.parameters())
    print(f"rank {dist.get_rank()}: {held:,} bytes of weights, {2 * held:,} of moments")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
