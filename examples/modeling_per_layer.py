# SPDX-License-Identifier: MIT
"""Sparse MoE models whose layers have different numbers of experts, or experts of different widths, by the
`per_layer_config` of config.json, such as {"0": {"num_experts": 48}}: the stock classes of transformers, in which each
MoE block is built again by its layer's configuration. It lies beside the weights of such a checkpoint.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)       transformers 4.57 and 5.24

Train it without transformers' load-balancing loss, which wants as many experts in each layer: in TRL, which adds it by
default, router_aux_loss_coef=0.0.
"""
import copy

import transformers


def of_layer(config, index):
    """The configuration of a layer."""
    own = config.per_layer_config
    if not isinstance(own, dict):  # transformers 5 resolves it
        return own[index]
    config = copy.copy(config)
    for i, changes in own.items():
        for key, value in changes.items() if int(i) == index else ():
            setattr(config, key, value)
    return config


class PerLayer:
    _auto_class = "AutoModelForCausalLM"  # so that save_pretrained copies this file

    def __init__(self, config):
        text = config.get_text_config()
        text.allow_global_per_layer_attribute_access = True  # the stock class reads one num_experts for all layers
        super().__init__(config)
        for index, layer in enumerate(getattr(self.model, "language_model", self.model).layers):
            if hasattr(layer.mlp, "gate"):
                layer.mlp = type(layer.mlp)(of_layer(text, index))
                getattr(layer.mlp, "experts", layer.mlp).config = text  # so that set_experts_implementation reaches it


for name in ("OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM",
             "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"):
    if hasattr(transformers, name):
        globals()[name] = type(name, (PerLayer, getattr(transformers, name)), {})
