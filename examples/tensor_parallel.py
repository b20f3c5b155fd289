"""Tensor parallel: each rank holds some of the features of the layers of a Llama, column- and row-parallel in turn.

torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py
"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import pyshard

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same weights on all ranks, of which each then keeps its part
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **sizes))
whole = sum(p.numel() * p.element_size() for p in model.parameters())
mesh = pyshard.init_mesh(tp=world)
pyshard.tp.parallelize(model, mesh)
opt = pyshard.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
for step in range(40):
    start = torch.randint(256, (8, 1))  # the same batch on all ranks
    tokens = (start + 3 * torch.arange(16)) % 256
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    opt.step()
    opt.zero_grad()
    if rank == 0 and step % 10 in (0, 9):
        print(f"step {step} loss {loss.item():.4f}")
held = sum(p.numel() * p.element_size() for p in model.parameters())
print(f"rank {rank}: {held} bytes of weights (unsharded: {whole}), {2 * held} of optimizer state")
dist.destroy_process_group()
