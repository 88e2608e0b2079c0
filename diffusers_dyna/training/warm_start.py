# SPDX-License-Identifier: Apache-2.0
"""
A transformer of one task from the weights of another: what is new starts at zero, so that the outputs are those of the
model that it starts from.
"""

from pathlib import Path

import torch

from ..models import DynaDiTTransformer2DModel


# What another task may add to a model that has it not, and the modules that come with it.
ADDABLE = {
    "condition_channels": set(),
    "noise_level_conditioning": {"noise_level_embedding"},
    "cross_attention_dim": {"null_caption", "caption_projection", "norm_cross", "cross_attn", "cross_attn_rate"},
    "caption_pooling": {"null_caption", "caption_embedding", "caption_memory"},
}


def load_transformer(path: str | Path) -> DynaDiTTransformer2DModel:
    """
    Args:
        path (`str` or `Path`): of a pipeline or a transformer, a folder or a name on the Hub.

    Returns:
        [`DynaDiTTransformer2DModel`].
    """
    subfolder = "transformer" if (Path(path) / "transformer").is_dir() or not Path(path).is_dir() else None
    return DynaDiTTransformer2DModel.from_pretrained(path, subfolder=subfolder)


def adapt_transformer(
    transformer: DynaDiTTransformer2DModel, config: dict, name: str = "`transformer`"
) -> DynaDiTTransformer2DModel:
    """
    A transformer with all weights of another one and what its task has beyond that one's: channels of a condition, a
    noise level, captions. Their parts start at zero: whatever they are given, the outputs are those of `transformer`, to
    the rounding of sums.

    Where captions are added and `num_classes` becomes `None`, the embedding of the null class (or, where there is none,
    the mean of all classes) goes into the bias of the time embedding, so that the outputs are those of the null class;
    the biases of the routers, which read the time embedding without a class, take it back.

    Where the `router_mode` changes, the routers start anew.

    Args:
        transformer ([`DynaDiTTransformer2DModel`]): what to start from; does not change.
        config (`dict`): what the config of the result must have. The rest is that of `transformer`.
        name (`str`, defaults to `` "`transformer`" ``): what to call it in a message.

    Returns:
        [`DynaDiTTransformer2DModel`]; `transformer` itself where it has all of `config`.

    Raises:
        `ValueError`: if it differs from `config` in something that cannot be added, or its weights are not those of a
            model of its config, as with an adapter.
    """
    changes = {key: value for key, value in config.items() if transformer.config[key] != value}
    free = {"router_mode", *(key for key in ADDABLE if not transformer.config[key])}
    if not transformer.takes_text and (config.get("cross_attention_dim") or config.get("caption_pooling")):
        free |= {"caption_channels", "caption_dropout_prob"}
        free |= {"num_classes"} if config.get("num_classes", 0) is None else set()
    if not transformer.config.caption_pooling and config.get("caption_pooling"):
        free |= {"caption_memory_size", "caption_memory_temperature"}
    different = [
        f"`{key}`={transformer.config[key]!r} instead of {value!r}"
        for key, value in changes.items()
        if key not in free
    ]
    if different:
        advice = "Use the `--resolution`, the data and the flags that it was trained with."
        refused = changes.keys() - free
        if refused & {"condition_channels", "noise_level_conditioning"} and "in_channels" not in refused:
            advice = (
                "It was trained for another task: start from a model that draws (`--task generate`), or from one of the "
                "same task."
            )
        raise ValueError(f"{name} does not fit this run: it has {', '.join(different)}. {advice}")
    if not changes:
        return transformer

    adapted = DynaDiTTransformer2DModel.from_config(transformer.config, **changes)
    weights = {key: weight.clone() for key, weight in transformer.state_dict().items()}
    if "num_classes" in changes:
        classes = weights.pop("class_embedding.weight")
        null = classes[-1] if transformer.null_class_label is not None else classes.mean(dim=0)
        weights["time_embedding.linear_2.bias"] += null
        for key in transformer.router_parameters():
            module, _, parameter = key.rpartition(".")
            if parameter == "bias" and weights[f"{module}.weight"].shape[1] == len(null) and "selection" not in module:
                weights[key] -= weights[f"{module}.weight"] @ null
    if "condition_channels" in changes:
        projection = torch.zeros_like(adapted.pos_embed.proj.weight)
        projection[:, : transformer.config.in_channels] = weights["pos_embed.proj.weight"]
        weights["pos_embed.proj.weight"] = projection
    if "router_mode" in changes:
        weights = {key: weight for key, weight in weights.items() if key not in transformer.router_parameters()}
    if changes.get("caption_pooling"):
        # In a new model adaLN-Zero holds it back, here nothing would.
        torch.nn.init.zeros_(adapted.caption_embedding.linear_2.weight)
    missing, unexpected = adapted.load_state_dict(weights, strict=False)
    new_modules = set().union(*(ADDABLE.get(key, ()) for key in changes))
    new_routers = adapted.router_parameters() if "router_mode" in changes else {}
    lost = [key for key in missing if key not in new_routers and not new_modules & set(key.split("."))]
    if lost or unexpected:
        raise ValueError(
            f"{name} has other weights than its config says: {lost} are not in it, {unexpected} are beyond it. Merge "
            "adapters into the weights first."
        )
    return adapted
