"""Fully connected capsules routed once by self-attention: `capsfl_kernels.self_attention_routing`."""
