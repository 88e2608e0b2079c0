# SPDX-License-Identifier: Apache-2.0
"""The transformer with a text under FSDP 2, split by block as `_no_split_modules` says, against the plain one."""

import copy

import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..testing_utils import dit_inputs, mixed_dyna_dit, randn


@pytest.fixture
def mesh():
    """Of one process, without a port."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("router_mode", ["capacity", "threshold"])
def test_a_model_with_a_text_is_sharded_by_block(mesh, router_mode):
    inputs = dit_inputs()
    del inputs["class_labels"]
    inputs["encoder_hidden_states"] = randn(3, 6, 16, seed=5)
    inputs["encoder_attention_mask"] = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    text = {"num_classes": None, "cross_attention_dim": 24, "caption_channels": 16}
    model = mixed_dyna_dit(inputs, router_mode=router_mode, **text).train()
    sharded = copy.deepcopy(model)
    assert model._no_split_modules == [type(model.transformer_blocks[0]).__name__]
    for block in sharded.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    options = {"caption_dropout_mask": torch.tensor([False, True, False]), "output_masks": True}
    if router_mode == "threshold":
        options["gate_noise"] = torch.rand(3, model.config.num_layers, model.gate_noise_size(16))
    outputs = []
    for network in (model, sharded):
        output = network(**inputs, **options)
        (output.sample.square().mean() + output.compute_ratio.mean()).backward()
        outputs.append(output)
    torch.testing.assert_close(outputs[1].sample, outputs[0].sample)
    torch.testing.assert_close(outputs[1].compute_ratio, outputs[0].compute_ratio)
    expected = dict(model.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert expected[name].grad.any(), name
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)
