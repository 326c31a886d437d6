"""Imported first by a fork server that was not itself forked: it ends with the server, and has a name of its own."""

from serve.vllm_backend import forkserver

forkserver.settle()
