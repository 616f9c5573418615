"""A network of the timm library with a feature pyramid. timm is imported when such a backbone is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from torch import Tensor, nn

from focal_d2.config import focal_config
from focal_d2.config.legal_values import check_values
from focal_d2.errors import UserError, did_you_mean, one_line
from focal_d2.modeling.backbones.pyramid import build_pyramid, has_p2
from focal_d2.modeling.folding import BATCH_NORMS
from focal_d2.modeling.traced import is_recording

BUILDER = "build_focal_timm_fpn_backbone"
_KEY = "MODEL.FOCAL.TIMM.NAME"
_STRIDES = (8, 16, 32)
# detectron2's configs have it beside their defaults, in BGR order, for ResNets of torchvision and pycls.
_TORCHVISION_STD = [57.375, 57.12, 58.395]
# Tables that old versions of timm saved, and that are computed today.
_COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")

# Names of the EfficientNet-PyTorch project, and timm's.
_OUTSIDE_BLOCKS = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_NOT_EXPANDED = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


@BACKBONE_REGISTRY.register()
def build_focal_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a network of timm (`MODEL.FOCAL.TIMM.NAME`) with FPN levels P3 to P7, or P2 to P6.

    See `build_pyramid` for the pyramid and `TimmBottomUp` for the network, which starts with random weights:
    `MODEL.WEIGHTS` has others.

    Raises:
        UserError: for a value that is not legal, a model that timm does not have or whose features have other
            strides, or pixels that it was not made for.
    """
    check_values(cfg, "MODEL.FOCAL.FPN.", "MODEL.FOCAL.TIMM.", "MODEL.FPN.", "MODEL.BACKBONE.FREEZE_AT")
    focal = focal_config(cfg)
    _check_pixels(cfg)
    strides = (4, *_STRIDES) if has_p2(cfg) else _STRIDES
    net, out = create_features(focal.TIMM.NAME, in_channels=input_shape.channels, strides=strides)
    bottom_up = TimmBottomUp(
        net,
        out,
        name=focal.TIMM.NAME,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        train_norms=focal.TIMM.BATCH_NORM == "trained",
    )
    return build_pyramid(cfg, bottom_up, list(bottom_up.output_shape()))


class PixelValues(NamedTuple):
    """What a network of timm was trained with, for pixels of 0 to 255 in RGB order."""

    mean: list[float]
    std: list[float]


def pixel_values(name: str) -> PixelValues:
    """Return mean and standard deviation of timm's configuration of a model.

    Raises:
        UserError: if timm does not have the model.
    """
    timm = _timm_with(name)
    trained = timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    return PixelValues(*([round(255 * x, 4) for x in values] for values in (trained.mean, trained.std)))


def resolve_pixel_values(cfg: CfgNode) -> None:
    """Replace `MODEL.PIXEL_MEAN` and `PIXEL_STD` of detectron2's ResNets by those of a network of timm.

    A config may inherit the former. Other values, and the configs of other backbones, stay as they are.

    Args:
        cfg: full config that is not frozen, changed in place.

    Raises:
        UserError: if timm does not have the model.
    """
    if cfg.MODEL.BACKBONE.NAME == BUILDER and all(_has_resnets_pixels(cfg)):
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = pixel_values(focal_config(cfg).TIMM.NAME)


def _has_resnets_pixels(cfg: CfgNode) -> tuple[bool, bool]:
    """Return whether the mean, and whether the standard deviation, is one of detectron2's ResNets."""
    default = get_cfg().MODEL
    deviations = (default.PIXEL_STD, _TORCHVISION_STD)
    return list(cfg.MODEL.PIXEL_MEAN) == default.PIXEL_MEAN, list(cfg.MODEL.PIXEL_STD) in deviations


def _check_pixels(cfg: CfgNode) -> None:
    if cfg.INPUT.FORMAT not in ("RGB", "L"):
        raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}; networks of timm take RGB, or L (grey)")
    if any(_has_resnets_pixels(cfg)):
        name = focal_config(cfg).TIMM.NAME
        mean, std = pixel_values(name)
        raise UserError(
            f"MODEL.PIXEL_MEAN is {list(cfg.MODEL.PIXEL_MEAN)} and PIXEL_STD {list(cfg.MODEL.PIXEL_STD)}: at "
            f"least one is of detectron2's ResNets; {name} needs {mean} and {std}"
        )


def _timm_with(name: str) -> Any:
    """Import timm, and check that it has a model."""
    # It imports detectron2's checkpoints, which registering a backbone does not need.
    from focal_d2.storage.pretrained import import_timm

    timm = import_timm(f"MODEL.BACKBONE.NAME {BUILDER}")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise UserError(f'{_KEY} is "{name}"; timm has no such model{did_you_mean(architecture, known)}')
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise UserError(f"{_KEY} is {name}; legal values: {', '.join([architecture, *tagged])}")
    return timm


def create_features(name: str, *, in_channels: int, strides: tuple[int, ...]) -> tuple[nn.Module, list[int]]:
    """Create a network of timm that returns features, with random weights.

    Args:
        name: of the model, with or without the tag of pretrained weights.
        in_channels: of images.
        strides: of the features that are needed, ascending.

    Returns:
        The network, which maps images to a list of features, and the positions of the needed ones in it.

    Raises:
        UserError: if timm does not have the model, or the model does not have the features, or takes images
            of one size only.
    """
    timm = _timm_with(name)
    options: dict[str, Any] = {"features_only": True, "in_chans": in_channels}
    trained = timm.models.get_pretrained_cfg(name)
    if trained is not None and trained.fixed_input_size:
        options["dynamic_img_size"] = True  # transformers with windows have it

    def create(**more: Any) -> Any:
        try:
            return timm.create_model(name, **options, **more)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            height, width = trained.input_size[1:]
            raise UserError(f"{_KEY} is {name}, which takes images of {height} × {width} only") from error
        except RuntimeError as error:
            if "features_only" not in str(error):
                raise
            raise UserError(f"{_KEY} is {name}, which gives no features: {one_line(error)}") from error

    net = create()
    reductions = [x["reduction"] for x in net.feature_info.info]
    last = {stride: i for i, stride in enumerate(reductions)}
    if missing := [str(x) for x in strides if x not in last]:
        has = ", ".join(map(str, sorted(last)))
        raise UserError(f"{_KEY} is {name}, whose features have strides {has}, not {', '.join(missing)}")
    wanted = tuple(last[stride] for stride in strides)
    out = tuple(net.feature_info.out_indices)
    if not set(wanted) <= set(out) or max(out) > max(wanted):  # what comes after stride 32 would be idle
        out = wanted
        net = create(out_indices=out)
    return net, [out.index(i) for i in wanted]


class TimmBottomUp(Backbone):
    """A network of timm as the bottom-up part of a pyramid.

    Its outputs are called res2 to res5, as those of a ResNet, by their strides 4 to 32. Its parameters have
    timm's names after "net.".
    """

    def __init__(
        self, net: nn.Module, out: list[int], *, name: str, freeze_at: int, train_norms: bool
    ) -> None:
        """Wrap a network.

        Args:
            net: of `create_features`.
            out: positions of the outputs in what it returns.
            name: of the model, for messages.
            freeze_at: parameters up to the last stage of stride 2^freeze_at are not trained; 0: all are. This
                counts as detectron2's ResNets do: 1 is a stem of stride 2, 2 the stage of stride 4.
            train_norms: train batch norms; else they use their saved statistics, weights and biases. Those of
                frozen stages always do.

        Raises:
            UserError: for a network whose stages can't be told from each other, if some are to be frozen.
        """
        super().__init__()
        self.net, self.name, self._out = net, name, out
        info: Any = net.feature_info
        self._channels_last = getattr(net, "output_fmt", None) == "NHWC"
        chosen = [info.info[info.out_indices[i]] for i in out]
        self._shapes = {
            f"res{x['reduction'].bit_length() - 1}": ShapeSpec(x["num_chs"], stride=x["reduction"])
            for x in chosen
        }
        frozen = self.parameter_stages() if freeze_at else {}
        for parameter_name, parameter in self.named_parameters():
            if frozen.get(parameter_name, freeze_at + 1) <= freeze_at:
                parameter.requires_grad_(False)
        self._frozen_norms = []
        for module in net.modules():
            if isinstance(module, BATCH_NORMS):
                trained = [x.requires_grad for x in module.parameters(recurse=False)]
                if not train_norms or not all(trained):
                    module.requires_grad_(False)
                    self._frozen_norms.append(module.eval())

    def train(self, mode: bool = True) -> TimmBottomUp:
        """Set the mode of all parts except frozen batch norms, which stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_norms:
            module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of images (N, C, H, W).

        Raises:
            UserError: if features do not have the sizes that belong to their strides.
        """
        features = self.net(images)
        outputs = {}
        for (name, shape), i in zip(self._shapes.items(), self._out, strict=True):
            x = features[i].permute(0, 3, 1, 2) if self._channels_last else features[i]
            size, stride = images.shape[-2:], shape.stride or 1
            if not is_recording() and x.shape[-2:] != tuple(-(-side // stride) for side in size):
                raise UserError(
                    f"{_KEY} is {self.name}, whose features of stride {stride} have {x.shape[-2]} × "
                    f"{x.shape[-1]} cells in images of {size[0]} × {size[1]} pixels; they don't fit a pyramid"
                )
            outputs[name] = x
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each output, finest first."""
        return self._shapes

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter: s for what leads to the last feature of stride 2^s.

        timm's networks have their modules in the order in which they compute.

        Raises:
            UserError: if the network has no modules of the names that timm gives its stages.
        """
        info: Any = self.net.feature_info
        modules = [name for name, _ in self.net.named_modules()]
        ends: list[tuple[int, int]] = []  # position of a stage's last module, and the stage
        for feature in info.info[: max(info.out_indices) + 1]:
            path = feature["module"]
            names = {path, path.replace(".", "_", 1), f"model.{path}", f"body.{path}"}
            inside = [i for i, x in enumerate(modules) if any(x == n or x.startswith(f"{n}.") for n in names)]
            if not inside:
                raise UserError(
                    f"{_KEY} is {self.name}, whose stages are not known: MODEL.BACKBONE.FREEZE_AT must be 0, "
                    "SOLVER.FOCAL.LAYER_DECAY 1.0"
                )
            ends.append((inside[-1], feature["reduction"].bit_length() - 1))
        last_stage = ends[-1][1]
        stages = {}
        for position, (module_name, module) in enumerate(self.net.named_modules()):
            stage = next((stage for end, stage in ends if position <= end), last_stage)
            for name, _ in module.named_parameters(prefix=f"net.{module_name}".rstrip("."), recurse=False):
                stages[name] = stage
        return stages

    def translate_weights(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Give weights of timm's whole model, which have its names, the names that they have here.

        Args:
            weights: of a file; values are not looked at. They may have the names of the EfficientNet-PyTorch
                project, whose EfficientNets have the same parts.

        Returns:
            Those of the parts that this network has, with names of this module's state. What these parts have
            beyond this network, such as more blocks, stays, so that it is found not to fit.
        """
        parts = {name for name, _ in self.net.named_children()}
        whole = parts & {"model", "body"}  # timm's model is one part, and its parts are inside
        if len(parts) == len(whole) == 1:
            (prefix,) = (f"{x}." for x in whole)
            parts = {name for _, module in self.net.named_children() for name, _ in module.named_children()}
        else:
            prefix = ""
        translated = {}
        for name, x in self._from_efficientnet_pytorch(weights).items():
            # timm's networks of features have parts of parts as their own: stages.0.… is stages_0.…
            for here in (name, str(name).replace(".", "_", 1)):
                if here.split(".")[0] in parts and not here.endswith(_COMPUTED):
                    translated[f"net.{prefix}{here}"] = x
                    break
        return translated

    def _from_efficientnet_pytorch(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translate names of the EfficientNet-PyTorch project to timm's; others stay as they are.

        The project counts all blocks; timm counts the blocks of each stage. A block without expansion, the
        first one, has a convolution and a norm less, and timm's names count what is there.
        """
        if "_conv_stem.weight" not in weights:
            return weights
        paths = (re.match(r"blocks\.\d+\.\d+(?=\.)", name) for name, _ in self.net.named_modules())
        blocks = list(dict.fromkeys(path[0] for path in paths if path))
        translated = {}
        for name, x in weights.items():
            part, _, rest = name.partition(".")
            if part == "_blocks" and int(rest.partition(".")[0]) < len(blocks):
                number, layer, leaf = rest.split(".", 2)
                expands = f"_blocks.{number}._expand_conv.weight" in weights
                layers = _EXPANDED if expands else _NOT_EXPANDED
                name = f"{blocks[int(number)]}.{layers.get(layer, layer)}.{leaf}"
            elif part in _OUTSIDE_BLOCKS:
                name = f"{_OUTSIDE_BLOCKS[part]}.{rest}"
            translated[name] = x
        return translated
