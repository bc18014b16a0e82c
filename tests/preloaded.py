"""What the server of tests/starts.py imports, once, before anything is forked from it."""

import gc
import importlib
import os
import tempfile
import threading

import deepspeed
import deepspeed.ops
import pytest  # each start imports the main module of the process that asked for it
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from soul_exp import experiment

for name in (
    "accelerate.utils.deepspeed", "datasets", "deepspeed.checkpoint", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.zero.muon.muon_optimizer", "soul_exp.metrics.membership",
    "soul_exp.metrics.tofu", "soul_exp.optim.kernels.cpu", "soul_exp.tasks.tofu", "torch.profiler",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend", "torch.utils.serialization.config",
    "transformers.integrations.deepspeed", "transformers.models.llama.modeling_llama", "transformers.trainer",
):  # fmt: skip
    importlib.import_module(name)

tqdm.monitor_interval = 0  # no thread of its own
with tempfile.TemporaryDirectory() as folder:  # what transformers works out once, when it first reads a model
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=8, **small)).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)

IMPORTED = (deepspeed, pytest, AutoConfig, AutoModelForCausalLM, experiment)
PID = os.getpid()  # of the server
for thread in set(threading.enumerate()) - {threading.current_thread()}:
    thread.join(60)  # from_pretrained does not wait for the pool that read the weights
assert threading.active_count() == 1, threading.enumerate()  # a fork would leave the others behind
gc.freeze()  # a collection in a start looks at its own objects only
