"""`vllm bench serve` of the installed vLLM, with its result in a form that a test reads.

    python -m tests.support.foreign.vllm_bench OPTION...

Prints its result as one line of JSON.
"""

from __future__ import annotations

import json

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    result = main(parser.parse_args())
    print("\n" + json.dumps(result))
