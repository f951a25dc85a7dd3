"""CLIP: an image tower and a text tower that meet in one space (Radford et al. 2021, arXiv:2103.00020).

Shape suffixes: B pairs; H, W, C a picture's height, width, channels; L columns of the token matrix;
T real tokens of all captions.

Parameters have the names and shapes of OpenAI's state dict, which are open_clip's too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayclip.config import ModelConfig, TextConfig
from rayclip.models.text import pack
from rayclip.models.transformer import Transformer
from rayclip.models.vision import VisionTransformer

MAX_LOGIT_SCALE = math.log(100)


class CLIP(nn.Module):
    """Both towers, and the temperature that their cosines are multiplied by.

    Called as a module, so that DDP sees one forward, it returns both features and the scale. Under autocast
    the residual streams and the features stay float32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.context_length = text.context_length
        self.visual = VisionTransformer(config.vision, config.embed_dim, config.quick_gelu)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = Transformer(text.width, text.layers, text.heads, config.quick_gelu)
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self._init_text(text)

    @torch.no_grad()
    def _init_text(self, config: TextConfig) -> None:
        """OpenAI's initialisation; the image tower keeps PyTorch's defaults, as OpenAI's does."""
        width_std = config.width**-0.5
        residual_std = width_std * (2 * config.layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width_std)
        for name, weight in self.transformer.named_parameters():
            if name.endswith("in_proj_weight"):
                nn.init.normal_(weight, std=width_std)
            elif name.endswith(("out_proj.weight", "c_proj.weight")):
                nn.init.normal_(weight, std=residual_std)
            elif name.endswith("c_fc.weight"):
                nn.init.normal_(weight, std=(2 * config.width) ** -0.5)

    def forward(self, image_BHWC: Tensor, tokens_BL: Tensor, num_tokens_B: Tensor) -> tuple[Tensor, ...]:
        """Features of both sides, float32 [B, embed_dim] of length 1, the logit scale, exp(parameter), and the logit
        bias where the model has one."""
        image, text = self.encode_image(image_BHWC), self.encode_text(tokens_BL, num_tokens_B)
        outputs = (image, text, self.logit_scale.exp())
        return outputs if self.logit_bias is None else (*outputs, self.logit_bias)

    def encode_image(self, image_BHWC: Tensor) -> Tensor:
        """Pictures as unit vectors.

        Args:
            image_BHWC: [B, image_size, image_size, 3] RGB; uint8, or floating and already normalised with
                IMAGE_MEAN and IMAGE_STD. B may be 0: every parameter of the tower then has a gradient of zeros.

        Returns:
            float32 [B, embed_dim]

        Raises:
            ValueError: pictures of another shape.
        """
        return F.normalize(self.visual(image_BHWC).float(), dim=-1)

    def encode_text(self, tokens_BL: Tensor, num_tokens_B: Tensor) -> Tensor:
        """Captions as unit vectors. Only real tokens are computed, and that is exact.

        Args:
            tokens_BL: integer [B, L], start and end token included; what follows the end token is ignored.
            num_tokens_B: integer [B], tokens of each caption, start and end included. Best left on the host:
                the layout is made there. B may be 0, as in encode_image.

        Returns:
            float32 [B, embed_dim], rows in the order of the captions

        Raises:
            ValueError: a caption without tokens, or with more than L or than context_length.
        """
        columns = min(tokens_BL.shape[1], self.context_length)
        tokens_BL = tokens_BL[:, :columns]
        packing = pack(num_tokens_B, columns, tokens_BL.device)
        ids_T = tokens_BL.flatten().index_select(0, packing.source_T)
        # F.embedding and not indexing: its backward is much the faster.
        x_TW = self.token_embedding(ids_T) + F.embedding(packing.position_T, self.positional_embedding)
        x_BW = self.transformer(x_TW, packing.end_B, packing.groups, causal=True)
        features = (self.ln_final(x_BW) @ self.text_projection).float()
        return F.normalize(features, dim=-1).index_select(0, packing.unsort_B)

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep the scale in 1..100 (paper, section 2.5): call after each optimizer step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
