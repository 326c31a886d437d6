"""lm-eval over HTTP: each of its model types scores tasks of one's own.

    python -m tests.support.foreign.lm_eval_scores FILE

FILE holds a list of calls of lm-eval's `simple_evaluate`, as JSON, and `tasks` the folder that its tasks are in. Prints
the results of each as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    manager = TaskManager(include_path=asked["folder"], include_defaults=False)
    answers = [simple_evaluate(**call, task_manager=manager, bootstrap_iters=0) for call in asked["calls"]]
    print("\n" + json.dumps([answer["results"] for answer in answers]))
