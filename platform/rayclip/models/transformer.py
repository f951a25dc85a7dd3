"""The residual block that both towers share, over packed sequences.

Shape suffixes: T all tokens of a batch, sequence after sequence; B sequences; S sequences of one group;
N their length; W width; H heads; D width of a head.

Sequences are never padded: their tokens lie one after another in one [T, W] tensor, sequences of equal length
side by side. `groups` says how: pairs (number of sequences, their length), in the order of the rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Groups = list[tuple[int, int]]


class Attention(nn.Module):
    """Multi-head self-attention within each packed sequence; parameters named as in nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_TW: Tensor, groups: Groups, causal: bool, rows_B: Tensor | None = None) -> Tensor:
        """Attend from every token, -> [T, W], or from one token of each sequence, at `rows_B`, -> [B, W]."""
        return self._every(x_TW, groups, causal) if rows_B is None else self._one(x_TW, groups, rows_B)

    def _every(self, x_TW: Tensor, groups: Groups, causal: bool) -> Tensor:
        qkv = F.linear(x_TW, self.in_proj_weight, self.in_proj_bias)
        # One split has one backward (a concatenation); slices would each fill a [T, 3W] of zeros.
        parts = qkv.split([count * length for count, length in groups])
        attended = []
        for (count, length), part in zip(groups, parts, strict=True):
            q, k, v = self._heads(part, 3, count, length)
            out_SHND = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            attended.append(out_SHND.transpose(1, 2).reshape(count * length, x_TW.shape[1]))
        return self.out_proj(_join(attended))

    def _one(self, x_TW: Tensor, groups: Groups, rows_B: Tensor) -> Tensor:
        # No mask: causal sequences are read at their last token, which sees them whole.
        width = x_TW.shape[1]
        q_weight, kv_weight = self.in_proj_weight.split([width, 2 * width])
        q_bias, kv_bias = self.in_proj_bias.split([width, 2 * width])
        q_parts = F.linear(x_TW.index_select(0, rows_B), q_weight, q_bias).split([count for count, _ in groups])
        kv_parts = F.linear(x_TW, kv_weight, kv_bias).split([count * length for count, length in groups])
        attended = []
        for (count, length), q_part, kv_part in zip(groups, q_parts, kv_parts, strict=True):
            (q,) = self._heads(q_part, 1, count, 1)
            k, v = self._heads(kv_part, 2, count, length)
            attended.append(F.scaled_dot_product_attention(q, k, v).reshape(count, width))
        return self.out_proj(_join(attended))

    def _heads(self, x: Tensor, num: int, count: int, length: int) -> tuple[Tensor, ...]:
        """[S * N, num * W] -> num times [S, H, N, D], all of them views."""
        return x.view(count, length, num, self.heads, self.head_width).permute(2, 0, 3, 1, 4).unbind(0)


class MLP(nn.Module):
    """Two linear layers with GELU, or QuickGELU, between them."""

    def __init__(self, width: int, quick_gelu: bool, mlp_ratio: float) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.activation = _quick_gelu if quick_gelu else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, width: int, heads: int, quick_gelu: bool, mlp_ratio: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, quick_gelu, mlp_ratio)

    def forward(self, x_TW: Tensor, groups: Groups, causal: bool, rows_B: Tensor | None = None) -> Tensor:
        """-> [T, W], or, at `rows_B` only, [B, W]."""
        attended = self.attn(self.ln_1(x_TW), groups, causal, rows_B)
        return self.finish(attended, x_TW if rows_B is None else x_TW.index_select(0, rows_B))

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """What follows attention, token by token; both [T, W] -> [T, W]."""
        x = attended + x
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks of which one row a sequence is read.

    Because nothing else of the last block's output is used, that block computes its queries, its output
    projection and its MLP for those rows only: the same result for about a sixth of the block's work.
    """

    def __init__(self, width: int, layers: int, heads: int, quick_gelu: bool, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, quick_gelu, mlp_ratio) for _ in range(layers))
        self.checkpoint_activations = False

    def forward(self, x_TW: Tensor, rows_B: Tensor, groups: Groups, causal: bool) -> Tensor:
        """Run the blocks.

        Args:
            x_TW: packed tokens, [T, W].
            rows_B: int64 [B], the row of x_TW to read for each sequence, in packed order. Where `causal`, it
                must be the sequence's last.
            groups: how sequences lie in x_TW; never empty (an empty batch is one group of no sequences).
            causal: a token sees only itself and what precedes it.

        Returns:
            [B, W], in packed order.
        """
        *blocks, last = self.resblocks
        for block in blocks:
            x_TW = self._run(block, x_TW, groups, causal)
        return self._run(last, x_TW, groups, causal, rows_B)

    def _run(self, block: nn.Module, *inputs: object) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def checkpoint_activations(model: nn.Module) -> None:
    """Let every transformer in `model` keep its blocks' inputs only, and compute the rest anew in backward.

    Gradients stay what they are. Memory falls to about that of one block; time grows by a forward pass.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            module.checkpoint_activations = True


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile what the transformers in `model` do token by token: residuals, layer norm and MLP.

    Their number of tokens is a symbol of the compiled code, and how captions lie among them, which differs from batch
    to batch, is not in it: so it is compiled once for each tower and precision, whatever lengths captions have.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.finish = torch.compile(module.finish, dynamic=True, backend=backend)  # type: ignore[method-assign]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _quick_gelu(x: Tensor) -> Tensor:
    # x * sigmoid(1.702 x), written so that autograd keeps one tensor and not three.
    return F.silu(1.702 * x) / 1.702
