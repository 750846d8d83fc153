"""Forks a process of pytest for each request on standard input, with the libraries that all tests import imported.

A request is a line of JSON, `arguments`, `environment` and `output` (a file); the answers are the process's id and then
its exit status, a line each. The product itself is imported by each process anew.
"""

import json
import os
import sys

import accelerate  # noqa: F401
import hydra  # noqa: F401
import hypothesis  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest
import torch.distributed.fsdp  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401


def main() -> None:
    """Serves requests until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.environ.update(request["environment"])
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT)
            for old, new in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
                os.dup2(old, new)
            status = pytest.main(request["arguments"])
            sys.stdout.flush()
            os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
