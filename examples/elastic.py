"""Training that goes on after a worker is lost: torchrun starts all again, and they resume from the last checkpoint.

torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/elastic.py runs/elastic
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

import pyshard

PATH, STEPS, EVERY, BATCH = sys.argv[1], 40, 5, 32

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2, timeout=30)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=STEPS)
inputs = torch.randn(4096, 16)
targets = inputs[:, :4].sum(1, keepdim=True)
order = torch.Generator().manual_seed(1)  # of the batches, the same on all ranks: its state is the place in the data
start = 0
try:
    extra = pyshard.load_checkpoint(PATH, model, opt)
    start = extra["step"]
    scheduler.load_state_dict(extra["scheduler"])
    order.set_state(extra["order"])
except FileNotFoundError:
    pass  # the first start
for step in range(start, STEPS):
    # The whole batch does not depend on the number of ranks; each one takes its rows, and a mean over ranks is exact.
    rows = torch.randint(len(inputs), (BATCH,), generator=order)[rank::world]
    loss = mse_loss(model(inputs[rows]), targets[rows], reduction="sum") * world / BATCH
    loss.backward()
    opt.step()
    opt.zero_grad()
    scheduler.step()
    dist.all_reduce(loss := loss.detach() / world)
    if rank == 0:
        print(f"step {step} loss {loss.item():.9g} ranks {world}", flush=True)
    if (step + 1) % EVERY == 0:
        pyshard.save_checkpoint(
            PATH, model, opt, step=step + 1, scheduler=scheduler.state_dict(), order=order.get_state()
        )
dist.destroy_process_group()
