"""The decoder of all families (`config.FAMILIES`), on packed tokens. Parameters are named as in the checkpoints."""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

from micota_fast.model.attention import Attend, AttendLayer
from micota_fast.model.config import ModelConfig
from micota_fast.model.pointwise import TORCH, Pointwise
from micota_fast.model.rope import RotaryEmbedding

# Shape suffixes: T tokens, H hidden, N query heads, K key-value heads, d channels of a head, V vocabulary.


class RMSNorm(nn.Module):
    """Root mean square layer normalisation (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.pointwise = eps, TORCH

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention; what a token may see is up to `attend`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, N, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim, self.pointwise = d, TORCH
        self.q_proj = nn.Linear(H, N * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(H, K * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(H, K * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(N * d, H, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(d, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(d, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x_TH: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, attend: AttendLayer) -> Tensor:
        heads = (x_TH.shape[0], -1, self.head_dim)
        q_TNd = self.q_norm(self.q_proj(x_TH).view(heads))
        k_TKd = self.k_norm(self.k_proj(x_TH).view(heads))
        v_TKd = self.v_proj(x_TH).view(heads)
        q_TNd, k_TKd = self.pointwise.rotate(q_TNd, k_TKd, cos_T1R, sin_T1R)
        return self.o_proj(attend(q_TNd, k_TKd, v_TKd).flatten(1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.pointwise = TORCH

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(self.pointwise.swiglu(self.gate_proj(x_TH), self.up_proj(x_TH)))


class Block(nn.Module):
    """One layer: the unit that is sharded, checkpointed and compiled.

    Nothing in it tells which layer it is, so that one compiled graph serves all.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TH: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, attend: AttendLayer) -> Tensor:
        x_TH = x_TH + self.self_attn(self.input_layernorm(x_TH), cos_T1R, sin_T1R, attend)
        return x_TH + self.mlp(self.post_attention_layernorm(x_TH))


class Trunk(nn.Module):
    """Holds what Hugging Face names `model.*`; `Decoder.forward` runs it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim)


class Decoder(nn.Module):
    """A causal language model without its last product: it returns hidden states for loss or sampler to project.

    Built by `safetensors_io.load_model` or `init_random`; a bare `Decoder(config)` has torch's own initial weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids_T: Tensor, position_ids_T: Tensor, attend: Attend) -> Tensor:
        """Compute the hidden states after the final norm.

        Args:
            input_ids_T: int64 `[T]`, tokens of any number of documents, one after the other.
            position_ids_T: int64 `[T]`, position of each token in its own document.
            attend: `attend(layer)(q_TNd, k_TKd, v_TKd) -> out_TNd` decides which keys each query sees, its own token's
                among them. `PackedAttention` for whole documents; a server's writes k and v to its cache first.

        Returns:
            `[T, H]` in the dtype of the weights; logits are `hidden_TH @ lm_head_weight.T`.
        """
        x_TH = self.model.embed_tokens(input_ids_T)
        cos_T1R, sin_T1R = self.model.rotary_emb(position_ids_T, x_TH.dtype)
        for layer, block in enumerate(self.model.layers):
            x_TH = block(x_TH, cos_T1R, sin_T1R, attend(layer))
        return self.model.norm(x_TH)

    def use(self, pointwise: Pointwise) -> None:
        """Take these operations from now on instead of torch's own."""
        for module in self.modules():
            if isinstance(module, RMSNorm | Attention | MLP):
                module.pointwise = pointwise

    @property
    def lm_head_weight(self) -> nn.Parameter:
        """`[V, H]`: the output projection, which is the embedding itself where the checkpoint ties them."""
        module = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        assert isinstance(module.weight, nn.Parameter)
        return module.weight

    def num_params(self) -> int:
        """Return the number of parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seqlen: float) -> float:
        """Count the FLOPs of forward and backward for one token of a document of `seqlen` tokens.

        6 for each weight of a matrix product (PaLM, arXiv 2204.02311, appendix B; the embedding's look-up costs none,
        the output projection does), and 12·layers·heads·head_dim for each key a query sees, which under a causal mask
        is seqlen/2 on average. PaLM counts all seqlen keys: its figure is higher.
        """
        c = self.config
        looked_up = 0 if c.tie_word_embeddings else self.model.embed_tokens.weight.numel()
        attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seqlen / 2
        return 6.0 * (self.num_params() - looked_up) + attention


@lru_cache
def parameter_shapes(config: ModelConfig) -> Mapping[str, torch.Size]:
    """Name and shape of each tensor of a checkpoint of this configuration, in the model's order."""
    with torch.device("meta"):
        return MappingProxyType({name: p.shape for name, p in Decoder(config).named_parameters()})
