"""Watch a character-level language model: which layers have curvature, and how many sequences a batch should have.

    python examples/transformer.py

A two-layer transformer, all torch.nn, reads Python's help texts. Its tensors have a time axis, its
embedding gets integers, attention mixes positions: nothing has to be declared for that. `layers=`
adds series per layer.
"""

import pytorch_lightning as pl
import shared
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import CurvatureCallback

CONTEXT = 64


class Characters(pl.LightningModule):
    def __init__(self, alphabet: int, width: int = 64) -> None:
        super().__init__()
        self.token, self.position = (
            nn.Embedding(alphabet, width),
            nn.Parameter(0.02 * torch.randn(CONTEXT, width)),
        )
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, alphabet)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, characters: Tensor) -> Tensor:  # [N, T] -> [N, T, alphabet]
        T = characters.shape[1]
        h = self.token(characters) + self.position[:T]
        return self.head(self.norm(self.blocks(h, mask=self.mask[:T, :T], is_causal=True)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (rows,) = batch
        loss = F.cross_entropy(self(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    @torch.no_grad()
    def write(self, characters: list[int], count: int) -> list[int]:
        for _ in range(count):
            logits = self(torch.tensor([characters[-CONTEXT:]]))[0, -1]
            characters = [*characters, int(torch.multinomial((1.5 * logits).softmax(0), 1))]
        return characters


def main() -> None:
    options = shared.parser(__doc__).parse_args()
    pl.seed_everything(0, verbose=False)
    numbers, alphabet = shared.text()
    rows = numbers[: len(numbers) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    history = shared.History()
    trainer = shared.trainer(
        max_steps=12 if options.quick else 400,
        max_epochs=-1,
        log_every_n_steps=4 if options.quick else 10,
        callbacks=[
            CurvatureCallback(["noise_scale", "ggn_trace"], layers="norm|linear|token|head")
        ],
        logger=history,
    )
    model = Characters(len(alphabet))
    trainer.fit(model, DataLoader(TensorDataset(rows), batch_size=32, shuffle=True))

    noise = history.series["curvature/noise_scale"][1]
    print(f"training cross-entropy: {history.series['train/loss'][1][-1]:.2f} nats per character")
    print(f"noise scale: {noise[0]:.0f} sequences at the start, {noise[-1]:.0f} at the end")
    print("".join(alphabet[i] for i in model.write([alphabet.index(c) for c in "The "], 150)))

    figure, (loss, scale, layers) = shared.plt.subplots(
        1, 3, figsize=(12, 3.6), layout="constrained"
    )
    shared.draw(loss, history.series["train/loss"])
    loss.set(title="cross-entropy per character", xlabel="step")
    scale.semilogy(*history.series["curvature/noise_scale"], lw=2, color="C2")
    scale.set(title="noise scale [sequences]", xlabel="step")
    prefix = "curvature_layers/ggn_trace/"
    for i, name in enumerate(sorted(name for name in history.series if name.startswith(prefix))):
        layers.semilogy(
            *history.series[name],
            color=shared.plt.cm.viridis(i / 10),
            label=name.removeprefix(prefix),
        )
    layers.set(title="trace of the GGN, by layer", xlabel="step")
    layers.legend(fontsize=6, ncols=2)
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()
