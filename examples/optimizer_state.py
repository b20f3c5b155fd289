"""Optimizer-state sharding: each rank keeps a part of the moments and of the summed gradients.

torchrun --standalone --nproc-per-node 2 examples/optimizer_state.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

import pyshard

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same weights on all ranks
layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
model = nn.Sequential(nn.Embedding(256, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 256))
opt = pyshard.ShardedAdamW(model.parameters(), lr=3e-3, stage=2, max_grad_norm=1.0)
data = torch.Generator().manual_seed(rank)  # other batches on each rank
for step in range(40):
    start = torch.randint(256, (8, 1), generator=data)
    tokens = (start + 3 * torch.arange(17)) % 256
    loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()  # sums over ranks start here
    opt.step()
    opt.zero_grad()
    if rank == 0 and step % 10 in (0, 9):
        print(f"step {step} loss {loss.item():.4f}")
weights = sum(p.numel() * p.element_size() for p in model.parameters())
held = sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values() if isinstance(t, torch.Tensor))
print(f"rank {rank}: {weights} bytes of weights, {held} of optimizer state (unsharded: {2 * weights})")
if rank == 0:
    print(opt.explain())
dist.destroy_process_group()
