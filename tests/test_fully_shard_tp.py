"""Full sharding over tensor-parallel parts: two ranks of each, against one process."""

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import pyshard
from pyshard.placement import tensor_shard


def trains(rank: int, world: int, seed: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}

    def llama() -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=31, max_position_embeddings=16, num_key_value_heads=2, **sizes)
        return LlamaForCausalLM(config)

    mesh = pyshard.init_mesh(dp=2, tp=2)
    for sequence_parallel in (True, False):  # True: gradients of norms are summed over tp by hooks on parameters
        net, whole = llama(), llama()
        pyshard.tp.parallelize(net, mesh, sequence_parallel=sequence_parallel)
        shards = {name: tensor_shard(p) for name, p in net.named_parameters()}
        pyshard.fully_shard(net, mesh, param_dtype=None)
        for name, p in net.named_parameters():
            assert isinstance(p, DTensor) and tensor_shard(p) is shards[name] is not None
            assert tuple(p.shape) == shards[name].local_shape()
        a = pyshard.AdamW(net.parameters(), lr=0.01, max_grad_norm=0.5)
        b = pyshard.AdamW(whole.parameters(), lr=0.01, max_grad_norm=0.5)
        dp = mesh.get_local_rank("dp")
        for step in range(4):
            tokens = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(seed + step))
            own = net(input_ids=tokens[dp::2], labels=tokens[dp::2]).loss
            own.backward(), a.step(), a.zero_grad()
            expected = whole(input_ids=tokens, labels=tokens).loss
            expected.backward(), b.step(), b.zero_grad()
            mean = own.detach().double()
            dist.all_reduce(mean)
            # fp32 sums in another order, through four steps of Adam.
            assert mean.item() / world == pytest.approx(expected.item(), rel=1e-5)
            assert float(a.grad_norm) == pytest.approx(float(b.grad_norm), rel=1e-4)


def test_with_tensor_parallel_layers(seed: int) -> None:
    pytest.importorskip("transformers", reason="a Llama of transformers is what is cut (requirements/bench.txt)")
    ranks.run(trains, 4, seed % 2**31)
