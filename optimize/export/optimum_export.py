"""optimum's own exporter, in a process of its own over optimum's packages (`optimum.py`); nothing of ours is imported.

python optimum_export.py families             # model types that it exports with a cache, as JSON
python optimum_export.py export MODEL OUT     # what its validation said, as JSON, on the last line
"""

from __future__ import annotations

import importlib
import json
import logging
import sys

TASK = "text-generation-with-past"


def families() -> list[str]:
    importlib.import_module("optimum.exporters.onnx.model_configs")  # registers them
    from optimum.exporters.tasks import TasksManager

    kinds = TasksManager.get_supported_model_type_for_task(TASK, "onnx")
    return sorted(kinds)


def export(model: str, out: str) -> list[str]:
    """What the validation found wrong."""
    from optimum.exporters.onnx import main_export

    said: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "succeeded with the warning" in record.getMessage():
                said.append(record.getMessage())

    for name in ("optimum.exporters.onnx.convert", "optimum"):
        logging.getLogger(name).addHandler(Heard())
    main_export(
        model_name_or_path=model, output=out, task=TASK, dtype="fp32", local_files_only=True, do_validation=True,
        library_name="transformers", framework="pt",
    )  # fmt: skip
    return sorted(set(said))


if __name__ == "__main__":
    print(json.dumps(families() if sys.argv[1] == "families" else export(*sys.argv[2:])))
