"""Full sharding: each rank holds a part of every weight, gradient and optimizer state of a GPT-2.

torchrun --standalone --nproc-per-node 2 examples/full_sharding.py
"""

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

import pyshard

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same weights on all ranks, of which each then keeps its part
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4))
whole = sum(p.numel() * p.element_size() for p in model.parameters())
mesh = pyshard.init_mesh(dp=world)
pyshard.fully_shard(model, mesh)  # blocks are units; computes in bf16, sums gradients in fp32, keeps fp32 weights
opt = pyshard.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
torch.manual_seed(rank)  # other sequences on each rank
for step in range(40):
    start = torch.randint(256, (8, 1))
    tokens = (start + 3 * torch.arange(16)) % 256
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    opt.step()
    opt.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if rank == 0 and step % 10 in (0, 9):
        print(f"step {step} loss {mean.item() / world:.4f}")
held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
print(f"rank {rank}: {held} bytes of weights (unsharded: {whole}), {2 * held} of optimizer state")
dist.destroy_process_group()
