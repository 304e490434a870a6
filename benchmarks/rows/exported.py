"""A picture through the exported ADFA, BGAD and DiffusionAD, against the graph of an earlier commit."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.rows import Contender, Loaded, Row
from benchmarks.rows.steps import learnt, make


def graph(method: str) -> Callable[[Path], Loaded]:
    def load(folder: Path) -> Loaded:
        import onnxruntime
        import torch

        model, batch_of = learnt(method, folder)
        model.eval()
        model.calibrate([batch_of(torch.arange(4))])
        image = batch_of(torch.arange(1)).image
        written = torch.onnx.export(
            model.exportable() if hasattr(model, "exportable") else model, (image,), dynamo=True, verbose=False
        )
        assert written is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(written.model_proto.SerializeToString(), options)
        feed = {session.get_inputs()[0].name: image.numpy()}

        def act() -> list[float]:
            _, score = session.run(None, feed)
            return [float(value) for value in score]

        return Loaded({"score": act()}, act)

    return load


def compared(method: str, title: str, missed: str) -> Row:
    return Row(
        title=f"a picture through the exported {title}, the demo's settings",
        contenders={"now": Contender(graph(method)), "before": Contender(graph(method), is_earlier=True)},
        equal="settings, weights, the picture, one thread; the score to 0.001",
        target={"before": 1.5},
        make=make,
        tolerance={"score": 1e-3},
        missed=missed,
    )


ADFA = compared(
    "adfa",
    "ADFA",
    "The graph is the same: ONNX Runtime folds batch normalisations by itself. In int8 (`export.precisions`, below) it "
    "is 1.2 times faster.",
)
BGAD = compared(
    "bgad",
    "BGAD",
    "The graph is the same: ONNX Runtime folds batch normalisations by itself. In int8 (`export.precisions`, below) it "
    "is 1.9 times faster.",
)
DIFFUSION_AD = compared(
    "diffusion_ad",
    "DiffusionAD",
    "The graph is the same, and in int8 no faster: its constants were folded before.",
)
