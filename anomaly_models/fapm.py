"""FAPM: fast adaptive patch memory. A position is compared with the normal vectors of its own patch and layer only.

D. Kim, C. Park, S. Cho, S. Lee, "FAPM: Fast Adaptive Patch Memory for Real-time Industrial Anomaly Detection",
ICASSP 2023, arXiv 2211.07381, and the authors' inference script. The script that builds their memory was never
published; what is reconstructed is said below.

Training is one pass over the normal images. The feature maps of a frozen backbone, averaged 3 x 3, are cut into a grid
of patches. Each patch of each layer keeps a coreset of its vectors, chosen by greedy k-centre. Patches whose vectors
spread widely ("far", Fig. 2) keep `adaptive_ratio` times more. The distance to the nearest stored vector, summed over
layers, is the anomaly map. Objects are assumed to be aligned: a shifted part is compared with another patch's memory.

Reconstructed: a patch is far if its covering radius exceeds the mean of its layer's (`far_rule` offers others); far
patches keep `adaptive_ratio` times the near size; the coreset is chosen among the raw features, without projection.

Different from the published code, deliberately:
- Hold-out images never enter the memory: their distances would be near 0 and a threshold set on them meaningless.
- Coarse scores go to the fine positions they cover. The script lays the four coarse scores of a patch out along its
  rows, which loses left and right inside a patch; `coarse_layout: released` reproduces that.
- Images of a batch are queries of their own; the script mixes a batch into the positions.
- The image score's 1 - softmax is computed as the sum of the other shares, which large distances do not cancel to 0.
- The backbone stops at the deepest layer used, any number of layers is allowed, and `image_score` offers two more:
  the maximum of the distances, and the weight of PatchCore with the nearest distance as numerator (over the query's
  own neighbours, where PatchCore takes those of the vector it matched).
- Maps of one stride, as those of a vision transformer, have a memory each as well, and none is coarse; or one for their
  mean (`combine: mean`). With `grid: 1`, that is the usual nearest-neighbour memory of a transformer's patches, but
  for the average over 3 x 3.
- Outside the centre crop nothing is seen and the map is 0. With `crop` equal to `image_size` everything is seen.
- A cell outside the region that counts enters no memory and is at distance 0.

Memory is bounded, while it learns and afterwards, however many images there are. A patch holds all of its vectors while
they are no more than those of `held_images`; then it keeps a covering set (`HeldVectors`), from which nothing seen is
farther than s <= max(8 r*_h, 32/3 r*_c), r*_k being the smallest radius that k centres can have over all vectors, c the
vectors of `held_images`, and h what a far patch keeps of c, at most c/2. The k of a coreset are chosen among the set:
they cover it within 2 r*_k, as below, and all vectors within 2 r*_k + s. The coreset is as large as for `held_images`,
or all of the set where that is less. Which patches are far is decided by the radii over what is held.

Several processes share the images: each chooses a coreset among the vectors of its own, as large as the one that is
wanted, and of these together the wanted one is chosen in the same way (Malkomes et al., "Fast Distributed k-Center
Clustering with Outliers on Big Data", NIPS 2015). Every vector is then within r_share + r_union of the coreset: what
the shares' own coresets cover, at worst, and what the last choice covers of them. Greedily chosen among any of the
vectors, k of them cover these within twice the smallest radius r* that k centres can have over all vectors: were one
farther, it and the k would be more than 2 r* from one another, and two of them are within r* of one centre. So the
radius is at most 4 r*, where that of one process is at most 2 r*. Which patches are far is decided by the true radii,
over the vectors of all processes, or over those that each holds: of a share of more than `held_images`, a covering set.
All vectors are then within 4 r* + s of the coreset, since no r* of a share is larger than that of all.
"""

from collections.abc import Iterable
from math import gcd
from typing import Annotated, Literal, NamedTuple, Self

import torch
from einops import rearrange, repeat
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_models.base import AnomalyModel, Batch, Config, ModelError, Prediction, places_in
from anomaly_models.common.backbones import Backbone, BackboneConfig, map_sizes
from anomaly_models.common.memory_bank import HeldVectors, MemoryBank, Part, covering_radii, greedy_coreset
from anomaly_models.common.scoring import GaussianBlur, blur_radius, cells_within, resize_map, size_of, within
from anomaly_models.common.settings import Settings, Sides
from anomaly_models.common.shards import WHOLE, Shard
from anomaly_models.common.sizes import Size


class ComparedRule(Settings):
    """A patch is far if its covering radius exceeds the layer's mean or median."""

    name: Literal["mean", "median"]


class FixedRule(Settings):
    """No patch is far, or every patch is."""

    name: Literal["none", "all"]


class QuantileRule(Settings):
    """A patch is far if its covering radius exceeds this quantile of the layer's."""

    name: Literal["quantile"]
    value: Annotated[float, Field(gt=0, lt=1)]


class MeanStdRule(Settings):
    """A patch is far if its covering radius exceeds the layer's mean by this many standard deviations."""

    name: Literal["mean_std"]
    value: Annotated[float, Field(allow_inf_nan=False)]


FarRule = Annotated[ComparedRule | FixedRule | QuantileRule | MeanStdRule, Field(discriminator="name")]


class FAPMConfig(Config):
    backbone: BackboneConfig
    crop: Sides  # of the centre crop that the backbone sees, pixels; `image_size` for all of it
    grid: Sides  # patches along height and width, of each tile; 1 makes one memory per layer, as PatchCore does
    held_images: PositiveInt  # whose vectors a patch holds at once while it learns; of more, a set that covers them
    coreset_ratio: Annotated[float, Field(gt=0, le=1)]  # vectors kept in a near patch, of all that it may hold at once
    adaptive_ratio: PositiveInt  # how many times more a far patch keeps
    far_rule: FarRule
    neighbours: Annotated[int, Field(ge=2)]  # of the released image score, which is always 0 for 1
    coarse_layout: Literal["geometric", "released"]
    image_score: Literal["released", "max", "patchcore"]
    blur_sigma: PositiveFloat  # pixels

    @property
    def seen(self) -> Size:
        return self.crop

    @property
    def scored_pixels(self) -> int:
        return 1 if self.image_score == "max" else 0

    @property
    def learns_at_once(self) -> bool:
        return True

    @property
    def compared(self) -> int:
        """How many nearest vectors the scores are made of: all but "max" weigh the nearest against the next."""
        return 1 if self.image_score == "max" else self.neighbours

    @property
    def places(self) -> int:
        return self._num_tiles if self.grid.area > 1 else 1

    @property
    def tiles_at_a_place(self) -> int:
        """How many tiles of a picture share a memory."""
        return self._num_tiles // self.places

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop.height > self.image_size.height or self.crop.width > self.image_size.width:
            raise ValueError(f"crop must be at most image_size, found {self.crop} of {self.image_size}")
        if min(self.crop) < blur_radius(self.blur_sigma):
            raise ValueError(f"blur_sigma {self.blur_sigma} reaches beyond a map of {self.crop} pixels; lower it")
        return self


class Coreset(NamedTuple):
    """The vectors that a patch would keep were it far; the first `near_size` of them, were it near."""

    vectors: Tensor  # (far size, D)
    near_size: int
    near_radius: Tensor  # scalar, covering radius
    far_radius: Tensor  # likewise
    used: bool  # whether anything was seen there


def joined(bank: MemoryBank, held: HeldVectors) -> Tensor:
    """The vectors (n, D) of a patch; there are none where nothing counts."""
    return torch.cat([bank.centre.new_zeros(0, bank.centre.shape[1]), *held.chunks])


class FAPM(AnomalyModel):
    """Memory while it learns: the vectors of at most `held_images`, 2.4 MB an image for WideResNet-50 at 224 px."""

    Config = FAPMConfig
    makes_it_smaller = "lower its coreset_ratio or held_images, which its memory grows with, or fit fewer good parts"

    near_radius: Tensor  # (L, P), covering radii of the near coresets, over the vectors that were held at the end
    radius: Tensor  # (L, P), covering radii of the coresets that are kept
    far: Tensor  # (L, P), bool

    def __init__(self, config: FAPMConfig) -> None:
        """Raises ModelError if the maps of the backbone cannot be cut into `grid` x `grid` patches."""
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, config.crop, may_round=True)
        self.sizes = _map_sizes(config, self.backbone)
        num_patches = config.places * config.grid.area  # of each tile its own, one tile after the other
        self.banks = nn.ModuleList(MemoryBank(num_patches, channels) for channels in self.backbone.channels)
        self.blur = GaussianBlur(config.blur_sigma)
        per_patch = (len(self.sizes), num_patches)
        self.register_buffer("near_radius", torch.zeros(per_patch))
        self.register_buffer("radius", torch.zeros(per_patch))
        self.register_buffer("far", torch.zeros(per_patch, dtype=torch.bool))

    def prepare(self, normals: Iterable[Batch]) -> None:
        """Fill the banks. Raises ModelError if a patch has fewer vectors than `neighbours`."""
        self.prepare_together(normals, normals, WHOLE)

    @torch.no_grad()
    def prepare_together(self, normals: Iterable[Batch], share: Iterable[Batch], shard: Shard) -> None:  # noqa: ARG002
        num_patches = self.config.grid.area
        held = [self.held_by_patch(size) for size in self.sizes]
        looked_at = False
        for batch in share:
            looked_at = True
            for layer, features in enumerate(self.features(batch.image)):
                for place, images in places_in(batch, self.config.places):
                    region = None if batch.region is None else batch.region[images]
                    for patch, vectors in enumerate(self._learnt(features[images], region)):
                        held[layer][place * num_patches + patch].add(vectors)
        if not looked_at:
            raise ModelError("FAPM has no normal image to learn from")
        for layer, by_patch in enumerate(held):
            self._fill(layer, by_patch, shard)
            by_patch.clear()  # a layer's vectors are not needed while the next layer's coresets are chosen

    def held_by_patch(self, size: Size) -> list[HeldVectors]:
        """Empty, for a layer of that size: per patch, of all tiles."""
        config = self.config
        of_an_image = size.area // config.grid.area * config.tiles_at_a_place
        capacity = max(config.held_images * of_an_image, config.neighbours)
        kept = min(self.bank_sizes(capacity)[1], max(capacity // 2, 1))
        return [HeldVectors(capacity, kept) for _ in range(config.places * config.grid.area)]

    def _learnt(self, features: Tensor, region: Tensor | None) -> list[Tensor]:
        """Of a map (B, D, h, w), the vectors (n, D) of each patch that lie in the region."""
        vectors = self.by_patch(features)
        if region is None:
            return list(vectors)
        cells = self.by_patch(cells_within(self._cropped(region), size_of(features))).squeeze(2) > 0  # (P, n)
        return [of_patch[inside] for of_patch, inside in zip(vectors, cells, strict=True)]

    def _fill(self, layer: int, by_patch: list[HeldVectors], shard: Shard) -> None:
        """Choose the coresets of one layer from the vectors of each patch."""
        bank = self.banks[layer]
        assert isinstance(bank, MemoryBank)
        found = self._coresets(bank, by_patch) if shard.alone else self._merged_coresets(bank, by_patch, shard)
        for patch, coreset in enumerate(found):
            self.near_radius[layer, patch], self.radius[layer, patch] = coreset.near_radius, coreset.far_radius
        far = self.far[layer]
        used = torch.tensor([coreset.used for coreset in found], device=far.device)
        far[used] = far_patches(self.near_radius[layer, used], self.config.far_rule)
        self.radius[layer] = torch.where(far, self.radius[layer], self.near_radius[layer])
        kept = [
            coreset.vectors if is_far else coreset.vectors[: coreset.near_size]
            for coreset, is_far in zip(found, far.tolist(), strict=True)
        ]
        bank.fill(kept)

    def _coresets(self, bank: MemoryBank, by_patch: list[HeldVectors]) -> list["Coreset"]:
        """Of each patch."""
        found = []
        for held in by_patch:
            vectors = self._enough(joined(bank, held))  # one patch at a time, to copy little
            near_size, far_size = self._sizes(min(held.seen, held.capacity), len(held))
            indices, radius = greedy_coreset(vectors, far_size)
            used = held.seen > 0
            found.append(Coreset(vectors[indices], near_size, radius[near_size - 1], radius[far_size - 1], used))
        return found

    def _merged_coresets(self, bank: MemoryBank, by_patch: list[HeldVectors], shard: Shard) -> list["Coreset"]:
        """Of each patch, of the vectors of all processes, which take turns in choosing from those of the shares."""
        vectors = [joined(bank, held) for held in by_patch]
        counts = torch.zeros(shard.world, len(vectors), dtype=torch.long, device=bank.centre.device)
        counts[shard.rank] = torch.tensor([len(own) for own in vectors], device=counts.device)
        counts = shard.total(counts)
        seen = shard.total(torch.tensor([held.seen for held in by_patch], device=counts.device)).tolist()
        sizes = [
            self._sizes(min(number, held.capacity), in_all)
            for number, held, in_all in zip(seen, by_patch, counts.sum(0).tolist(), strict=True)
        ]
        cores: list[Tensor] = []  # of the shares, then of all
        for own, (_, size) in zip(vectors, sizes, strict=True):
            cores.append(own[greedy_coreset(own, min(size, len(own)))[0]] if len(own) else own)
        for patch, (_, size) in enumerate(sizes):
            numbers = counts[:, patch].clamp(max=size).tolist()
            union = shard.collected(cores[patch], numbers, owner=patch % shard.world)
            cores[patch] = bank.centre.new_zeros(size, bank.centre.shape[1]) if union is None else union
        for patch, (_, size) in enumerate(sizes):  # after all have been handed out, so that none waits for another
            if patch % shard.world == shard.rank:
                union = self._enough(cores[patch])
                cores[patch] = union[greedy_coreset(union, size)[0]]
        for patch, core in enumerate(cores):
            shard.spread(core, owner=patch % shard.world)
        radii = shard.highest(
            torch.stack([covering_radii(*of_patch) for of_patch in zip(vectors, cores, sizes, strict=True)])
        )
        parts = zip(cores, sizes, radii, seen, strict=True)
        return [Coreset(core, near, radius[0], radius[1], number > 0) for core, (near, _), radius, number in parts]

    def _enough(self, vectors: Tensor) -> Tensor:
        """As many as a bank needs in every group: the first is repeated where few were held, as of equal vectors.

        There are none outside the region, where no distance counts.
        """
        missing = self.config.neighbours - len(vectors)
        if missing <= 0:
            return vectors
        first = vectors[:1] if len(vectors) else vectors.new_zeros(1, vectors.shape[1])
        return torch.cat([vectors, first.expand(missing, -1)])

    def _sizes(self, counted: int, held: int) -> tuple[int, int]:
        """Vectors that a near and a far patch keep, of so many that count and of `held`, which may be fewer."""
        neighbours = self.config.neighbours
        near, far = self.bank_sizes(counted or neighbours)
        most = max(held, neighbours)
        return min(near, most), min(far, most)

    def bank_sizes(self, num_vectors: int) -> tuple[int, int]:
        """Vectors that a near and a far patch keep, of the `num_vectors` that each has."""
        config = self.config
        if num_vectors < config.neighbours:
            raise ModelError(
                f"FAPM finds {num_vectors} vectors per patch in the normal images and needs {config.neighbours} "
                "(neighbours); add normal images, or lower neighbours or grid"
            )
        near = max(config.neighbours, int(config.coreset_ratio * num_vectors))
        return near, min(num_vectors, config.adaptive_ratio * near)

    @torch.no_grad()
    def check_scores(self, holdout: Iterable[Batch]) -> None:
        """Raise ModelError if the weight of the image score is too small for float32."""
        if self.config.image_score == "max":
            return
        for batch in holdout:
            distances = within(self.distances(self.features(batch.image)), self._cells(batch.region))
            score, highest = image_score(distances, self.config.image_score), image_score(distances, "max")
            lost = score < highest * torch.finfo(score.dtype).tiny
            if lost.any():
                raise ModelError(
                    f"FAPM's image_score: {self.config.image_score} is 0 for a held-out part at distance "
                    f"{float(highest[lost][0]):.4g}: its {self.config.neighbours} neighbours lie too far apart for "
                    "their softmax, since the backbone's features are large; set image_score: max"
                )

    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        return self._detect(image, region, None)

    def forward_at(self, image: Tensor, region: Tensor | None, tile: Tensor) -> Prediction:
        return self._detect(image, region, tile if self.config.places > 1 else None)

    def _detect(self, image: Tensor, region: Tensor | None, tile: Tensor | None) -> Prediction:
        distances = within(self.distances(self.features(image), tile), self._cells(region))
        score = image_score(distances, self.config.image_score)
        seen = None if region is None else self._cropped(region)
        cropped = self.blur(resize_map(distances[:, :1], self.config.crop), seen)
        top, left = self._margins
        below = self.config.image_size.height - self.config.crop.height - top
        right = self.config.image_size.width - self.config.crop.width - left
        return Prediction(F.pad(cropped, (left, right, top, below)), score)

    @property
    def _margins(self) -> Size:
        """Above the centre crop, and left of it."""
        image, crop = self.config.image_size, self.config.crop
        return Size((image.height - crop.height) // 2, (image.width - crop.width) // 2)

    def features(self, image: Tensor) -> list[Tensor]:
        """Per layer (B, D, h, w): the backbone's maps of the centre crop, each position averaged with its neighbours.

        The zeros beyond the border count in the average, in training and in use alike.
        """
        maps = self.backbone(self._cropped(image))
        return [F.avg_pool2d(features, kernel_size=3, stride=1, padding=1) for features in maps]

    def _cropped(self, image: Tensor) -> Tensor:
        """The centre of (B, C, H, W)."""
        (top, left), (height, width) = self._margins, self.config.crop
        return image[:, :, top : top + height, left : left + width]

    def _cells(self, region: Tensor | None) -> Tensor | None:
        """Where distances count, (B, 1, h, w) at the finest resolution."""
        return None if region is None else cells_within(self._cropped(region), self.sizes[0])

    def by_patch(self, features: Tensor) -> Tensor:
        """Group the positions of a map (B, D, h, w) by patch: (P, B * positions, D)."""
        grid = self.config.grid
        return rearrange(features, "b d (gh h) (gw w) -> (gh gw) (b h w) d", gh=grid.height, gw=grid.width)

    def distances(self, features: list[Tensor], tile: Tensor | None = None) -> Tensor:
        """Distances (B, k, h, w) at the finest resolution: the k smallest of each layer, added rank by rank.

        `tile`: which memory they are compared with, (1,), where each tile has its own.
        """
        total: Tensor | None = None
        grid = self.config.grid
        for bank, size, layer_features in zip(self.banks, self.sizes, features, strict=True):
            height, width = size.height // grid.height, size.width // grid.width  # of a patch
            part = None if tile is None else Part(tile, self.config.places)
            nearest = bank(self.by_patch(layer_features), self.config.compared, part)
            nearest = rearrange(nearest, "p (b h w) k -> b k p h w", h=height, w=width)
            enlarged = enlarge(nearest, self.sizes[0].height // size.height, self.config.coarse_layout)
            total = enlarged if total is None else total + enlarged
        assert total is not None
        return rearrange(total, "b k (gh gw) h w -> b k (gh h) (gw w)", gh=grid.height)


def _map_sizes(config: FAPMConfig, backbone: Backbone) -> tuple[Size, ...]:
    """Of the backbone's maps; ModelError unless the grid divides all of them."""
    sizes = map_sizes(backbone, config.crop, "FAPM's crop")
    for axis, wanted in config.grid._asdict().items():
        sides = [getattr(size, axis) for size in sizes]
        common = gcd(*sides)
        if common % wanted:
            valid = [number for number in range(1, common + 1) if common % number == 0]
            found = " and ".join(map(str, dict.fromkeys(sides)))
            raise ModelError(
                f"FAPM's grid must divide the sides of the feature maps, {found} for crop "
                f"{getattr(config.crop, axis)}, found {wanted}; take one of {', '.join(map(str, valid))}"
            )
    return sizes


def far_patches(radius: Tensor, rule: ComparedRule | FixedRule | QuantileRule | MeanStdRule) -> Tensor:
    """Which patches of a layer get the larger memory, (P,) bool, given their covering radii (P,)."""
    match rule:
        case FixedRule(name=name):
            return torch.full_like(radius, name == "all", dtype=torch.bool)
        case QuantileRule(value=value):
            return radius > radius.quantile(value)
        case MeanStdRule(value=value):
            return radius > radius.mean() + value * radius.std(correction=0)
        case ComparedRule(name="median"):
            return radius > radius.quantile(0.5)
        case _:
            # A mean of equal numbers can fall a rounding below them, which would make every patch far.
            return (radius > radius.mean()) & (radius > radius.min())


def enlarge(scores: Tensor, factor: int, layout: Literal["geometric", "released"]) -> Tensor:
    """Give the scores of a patch (B, k, P, h, w) to the positions of the finest layer, (B, k, P, h * f, w * f).

    "geometric" gives a score to the f x f positions it covers. "released" lists the scores row by row, each f * f
    times, and reads the list row by row, as the authors' script does.
    """
    if layout == "geometric":
        return repeat(scores, "b k p h w -> b k p (h fh) (w fw)", fh=factor, fw=factor)
    height, width = scores.shape[-2:]
    listed = repeat(scores, "b k p h w -> b k p (h w f)", f=factor**2)
    return rearrange(listed, "b k p (h w) -> b k p h w", h=height * factor, w=width * factor)


def image_score(distances: Tensor, kind: Literal["released", "max", "patchcore"]) -> Tensor:
    """The score (B,) of the position (of the finest feature map) that lies farthest from its memory.

    Takes distances (B, k, h, w), ascending in k. "max" is the nearest distance there. The others weight it by
    1 - softmax over its k distances: "released" of the largest, "patchcore" of the smallest. 1 - softmax is the sum of
    the others' shares: a difference would be exactly 0 as soon as the largest distance is 17 above the next. The sum
    is so from 87 on, where float32 ends.
    """
    flat = rearrange(distances, "b k h w -> b k (h w)")
    highest, position = flat[:, 0].max(dim=-1)
    if kind == "max":
        return highest
    index = repeat(position, "b -> b k 1", k=flat.shape[1])
    share = flat.gather(2, index).squeeze(2).softmax(dim=1)  # (B, k), growing with the distance
    others = share[:, :-1] if kind == "released" else share[:, 1:]
    return others.sum(dim=1) * highest
