"""Everything that loradock changes in vLLM: what is replaced, by what, of which kind, and why.

Nothing of vLLM is imported here, so that the table can be held against a version that is not installed
(`make vllm-diff`). A patch is on or off as a whole. Each function that it replaces is known by the digest of its source
in the versions that were read.
"""

from __future__ import annotations

from collections.abc import Mapping

from serve.vllm_backend.patches.patch import Function, Patch

# The version that the tests, and on a GPU `make gpu`, have run on; and those whose functions were read against ours.
PINNED = "0.32.0"
READ = (PINNED, "0.33.0")

_CPU = "serve.cpu_kernels"
_HERE = "serve.vllm_backend"
_OPS = "vllm.lora.ops.torch_ops.lora_ops"
_GPU_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_CPU_RUNNER = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
_MANAGER = "vllm.lora.model_manager:LoRAModelManager"
_PLATFORM = "vllm.platforms.cpu:CpuPlatform"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_TEMPLATES, _RENDERER = f"{_HERE}.chat_template", "vllm.renderers.hf:HfRenderer"
_STORE = f"{_HERE}.patches.response_store"
_STORED = "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses"
_LAYERS = "vllm.model_executor.layers"
_EMBEDDING = f"{_LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod"
_LINEAR = "vllm.model_executor.kernels.linear"
_PROMPTS = "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker"
_LORA_KERNELS = "LORADOCK_LORA_KERNELS"
_ROWS = f"{_CPU}.install:with_an_adapter"

CORRECTNESS: tuple[Patch, ...] = (
    Patch(
        "lora-rows",
        "correctness",
        "a row without an adapter has the number -1, which is the last slot's: another request's adapter",
        (
            Function(
                f"{_OPS}:bgmv_shrink", "6958e3518003", _ROWS, fixed={"0.33.0": "6902ae0a60d5"}, copies="vllm.lora"
            ),
            Function(
                f"{_OPS}:bgmv_expand", "8a1cf5319661", _ROWS, fixed={"0.33.0": "19888d1b3793"}, copies="vllm.lora"
            ),
            Function(
                f"{_OPS}:bgmv_expand_slice", "fa791c69bd6d", _ROWS, fixed={"0.33.0": "1cafb65e735b"}, copies="vllm.lora"
            ),
        ),
        upstream="https://github.com/vllm-project/vllm/pull/48421",
        on="cpu",
    ),
    Patch(
        "lora-device",
        "correctness",
        "the int8 kernel packs a weight and leaves None in its place, of whose device vLLM asks: no adapters on W8A8",
        (
            Function(
                "vllm.lora.layers.utils:_get_lora_device",
                "750e24d016ca",
                f"{_CPU}.install:get_lora_device",
                copies="vllm.lora",
            ),
        ),
        on="cpu",
    ),
    Patch(
        "int8-rows",
        "correctness",
        "with AMX the int8 kernel takes rows alone, and models that run by transformers' code (Seed-OSS, Arcee, OLMo, "
        "OLMo 3, Ministral, Hunyuan, GLM) have sequences of them: W8A8 ends the start",
        (
            Function(
                f"{_LINEAR}.scaled_mm.cpu:CPUInt8ScaledMMLinearKernel._apply_weights_sgl",
                "cfc2f7865908",
                f"{_CPU}.install:multiply_int8_rows",
                fixed={"0.33.0": "ee62ad09dc0c"},
            ),
        ),
        on="cpu",
    ),
    Patch(
        "prompt-logprobs",
        "correctness",
        "the rows of a prompt are computed with the adapters of other requests",
        (
            Function(
                f"{_GPU_RUNNER}._get_prompt_logprobs_dict",
                "1d65a0526f36",
                f"{_HERE}.patches.prompt_logprobs:get_prompt_logprobs_dict",
            ),
            Function(
                f"{_PROMPTS}.compute_prompt_logprobs",
                "18627430856e",
                f"{_HERE}.patches.prompt_logprobs:compute_prompt_logprobs",
            ),
            Function(
                f"{_PROMPTS}.compute_prompt_token_id_logprobs",
                "094ccc960469",
                f"{_HERE}.patches.prompt_logprobs:compute_prompt_logprobs",
            ),
        ),
        upstream="https://github.com/vllm-project/vllm/issues/51594",
    ),
    Patch(
        "seeded-prompts",
        "correctness",
        "a seeded request whose prompt comes in parts ends the engine on a CPU",
        (
            Function(f"{_GPU_RUNNER}._sample", "06eebfae6957", f"{_HERE}.patches.seeded_prompts:sample", via="runner"),
            Function(
                f"{_GPU_RUNNER}._bookkeeping_sync",
                "cba1efebd082",
                f"{_HERE}.patches.seeded_prompts:bookkeeping_sync",
                via="runner",
            ),
        ),
        on="cpu",
    ),
    Patch(
        "message-errors",
        "correctness",
        "what a client sends and vLLM cannot read is a 500; parts of messages that are models are read by nobody",
        (
            Function(
                "vllm.renderers.chat_utils:parse_chat_messages",
                "dc19d1305240",
                f"{_HERE}.patches.error_translation:parse",
                changed={"0.33.0": "ea6bf3bec5f2"},
                copies="vllm",
            ),
            Function(
                "vllm.renderers.chat_utils:parse_chat_messages_async",
                "7dddb9fa078a",
                f"{_HERE}.patches.error_translation:parse_async",
                changed={"0.33.0": "88c6c15823de"},
                copies="vllm",
            ),
            Function(
                "vllm.entrypoints.openai.responses.utils:construct_input_messages",
                "eacfe2cc5966",
                f"{_HERE}.patches.error_translation:construct",
                copies="vllm",
            ),
        ),
        process="server",
    ),
    Patch(
        "tool-calls",
        "correctness",
        "half of a tool call is the text of a whole answer, and not of a stream",
        (
            Function(
                "vllm.tool_parsers.hermes_tool_parser:Hermes2ProToolParser.extract_tool_calls",
                "9ced4c1270e2",
                f"{_HERE}.patches.tool_calls:extract_tool_calls",
            ),
        ),
        process="server",
    ),
    Patch(
        "renderer",
        "correctness",
        "a chat template may take all memory or not end, and an adapter's own tokens are not known",
        (
            Function(f"{_RENDERER}.__init__", "42ca18ebc728", via=_TEMPLATES),
            Function(f"{_RENDERER}._render_with_timeout", "4329c3e90752", via=_TEMPLATES),
            Function(f"{_RENDERER}._replace_executor", "e3369bf958c7", via=_TEMPLATES),
            Function(
                "vllm.renderers.base:BaseRenderer.__init__",
                "59786b35d1fb",
                changed={"0.33.0": "1e1c93af4a6a"},
                via=f"{_HERE}.adapter_tokenizers",
            ),
        ),
        process="server",
    ),
    Patch(
        "response-store",
        "correctness",
        "a new turn goes on from a response without an answer as if nothing had been said, and events do not end",
        (
            Function(f"{_STORED}.retrieve_responses", "8e8f043ca1c4", via=_STORE),
            Function(
                f"{_STORED}.responses_background_stream_generator",
                "15c3769bb80c",
                changed={"0.33.0": "036717b07c8f"},
                via=_STORE,
            ),
            Function(f"{_STORED}._render_resolved_response_inputs", "fdd936b0c5fd", via=_STORE),
        ),
        process="server",
    ),
    Patch(
        "response-events",
        "correctness",
        "a stream that ends at max_output_tokens closes as a complete one",
        (
            Function(
                f"{_STORED}.responses_stream_generator",
                "aa8b4205b275",
                f"{_HERE}.patches.response_events:generate",
                fixed={"0.33.0": "6ab56c957a01"},
            ),
        ),
        process="server",
    ),
    Patch(
        "grammar-backends",
        "correctness",
        "a schema is compiled by another library than it was checked by, which leaves out what it does not know",
        (
            Function(
                "vllm.v1.structured_output:StructuredOutputManager.grammar_init",
                "d6c83da8d1c6",
                f"{_HERE}.grammar_backends:grammar_init",
                changed={"0.33.0": "e2ebfc33fa92"},
            ),
        ),
        upstream="https://github.com/vllm-project/vllm/issues/43920",
    ),
)

SECURITY: tuple[Patch, ...] = (
    Patch(
        "media",
        "security",
        "a request could name a private address of this server's network",
        (
            Function(
                "vllm.connections:HTTPConnection.get_async_client",
                "416861917305",
                f"{_HERE}.patches.media:get_async_client",
            ),
        ),
        upstream="https://github.com/vllm-project/vllm/issues/57157",
    ),
    Patch(
        "structured-outputs",
        "security",
        "it converts schemas on the event loop, for as long as that takes",
        (
            Function(
                "vllm.sampling_params:SamplingParams._validate_structured_outputs",
                "1d9e82c3bb81",
                f"{_HERE}.structured_outputs:validate_structured_outputs",
            ),
        ),
        upstream="https://github.com/vllm-project/vllm/issues/54003",
        process="server",
    ),
)

SPEED: tuple[Patch, ...] = (
    Patch(
        "token-texts",
        "speed",
        "each token of log-probabilities is decoded anew on the event loop",
        (
            Function(
                "vllm.tokenizers.detokenizer_utils:convert_ids_list_to_tokens",
                "077472688242",
                f"{_HERE}.patches.token_texts:convert_ids_list_to_tokens",
                copies="vllm",
            ),
        ),
        upstream="https://github.com/vllm-project/vllm/pull/54050",
    ),
    Patch(
        "tokenizer-copies",
        "speed",
        "it copies the whole tokenizer for each thread",
        (
            Function(
                "vllm.tokenizers.hf:maybe_make_thread_pool",
                "0e93857d4201",
                f"{_HERE}.patches.tokenizer_copies:make_thread_pool",
                copies="vllm.",
            ),
        ),
        upstream="https://github.com/vllm-project/vllm/pull/41181",
    ),
    Patch(
        "active-adapters",
        "speed",
        "it lists all adapters in memory for each that a step uses: tenths of a millisecond where they are a thousand",
        (
            Function(
                "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters",
                "26e612b97ac3",
                f"{_HERE}.patches.active_adapters:apply_adapters",
            ),
        ),
    ),
    Patch(
        "triton-overrides",
        "speed",
        "it looks at each value of each module, so that a forked process shares nothing any more",
        (
            Function(
                f"{_PLATFORM}.register_triton_kernel_overrides",
                "a9849b03fc5f",
                f"{_HERE}.patches.triton_overrides:register_once",
            ),
        ),
        on="cpu",
    ),
    Patch(
        "token-ranks",
        "speed",
        "of a few rows it takes microseconds, and the compiler seconds at every start",
        (
            Function(
                "vllm.v1.sample.ops.logprobs:batched_count_greater_than",
                "25706dd241cd",
                f"{_CPU}.token_ranks:count_greater",
                copies="vllm.v1",
            ),
        ),
        upstream="https://github.com/vllm-project/vllm/pull/38933",
        on="cpu",
    ),
    Patch(
        "kv-cache-memory",
        "speed",
        "all of the cache is written at the start, and so is in memory before a request needs any of it",
        (
            Function(
                "vllm.v1.worker.utils:allocate_kv_cache",
                "d68296c0d93c",
                f"{_CPU}.kv_cache:allocate_kv_cache",
                copies="vllm.v1.worker",
            ),
        ),
        on="cpu",
    ),
    Patch(
        "sending",
        "speed",
        "its thread sends a token only when the next step computes",
        (
            Function(
                "vllm.v1.engine.core:EngineCoreProc.process_output_sockets",
                "ffceb04551a3",
                f"{_CPU}.sending:process_output_sockets",
            ),
        ),
        on="cpu",
    ),
    Patch(
        "fast-stream",
        "speed",
        "the tokens of a plain stream go to the socket without a message and JSON of vLLM's for each",
        (
            Function(
                "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
                "dc6e516855ea",
                changed={"0.33.0": "7eb86049ffa5"},
                via="serve.vllm_backend.output_processor",
            ),
            Function(
                "vllm.v1.engine.output_processor:RequestState.make_request_output",
                "06413a86ee2f",
                changed={"0.33.0": "500f5a95ac1e"},
                via="serve.vllm_backend.output_processor",
            ),
        ),
        process="server",
    ),
    Patch(
        "token-table",
        "speed",
        "the text of each token is decoded anew with the tokens before it, also where it stands in a table",
        (
            Function(
                "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.decode_next",
                "78289b2d431c",
                via="serve.vllm_backend.detokenizer",
            ),
            Function(
                "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer._protected_step",
                "b5dd0b9717d8",
                via="serve.vllm_backend.detokenizer",
            ),
            Function(
                "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.update",
                "4b610566b4c1",
                via="serve.vllm_backend.detokenizer",
            ),
            Function(
                "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.get_next_output_text",
                "63a7cf0dea65",
                via="serve.vllm_backend.detokenizer",
            ),
        ),
        process="server",
    ),
    Patch(
        "step-stats",
        "speed",
        "it reads the environment for each token, and looks for its bucket in a histogram one by one",
        (
            Function(
                "vllm.v1.engine.output_processor:OutputProcessor._update_stats_from_output",
                "89ee1f1093f1",
                via="serve.vllm_backend.output_processor",
            ),
            Function(
                "vllm.v1.metrics.stats:IterationStats.update_from_output",
                "72a00441e816",
                changed={"0.33.0": "ed005353147e"},
                via="serve.vllm_backend.output_processor",
            ),
            Function(
                "vllm.v1.metrics.loggers:PrometheusStatLogger.record",
                "7d7325b6ec6c",
                via="serve.vllm_backend.vllm_metrics",
            ),
            Function(
                "vllm.v1.metrics.loggers:StatLoggerManager.record",
                "41e50fad15a2",
                via="serve.vllm_backend.vllm_metrics",
            ),
        ),
        process="server",
    ),
    Patch(
        "response-models",
        "speed",
        "each piece of each chunk of an answer is searched for fields that a request may not have, in Python",
        (
            Function(
                "vllm.entrypoints.serve.engine.protocol:OpenAIBaseModel.__log_extra_fields__",
                "8d7ea26b74d5",
                via="serve.vllm_backend.patches.response_models",
            ),
        ),
        process="server",
    ),
    Patch(
        "parsed-streams",
        "speed",
        "the pieces that a parser makes of tools and reasoning pass through three models and four generators each",
        (
            Function(
                "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat._make_parser",
                "367a2c9f7ed1",
                f"{_HERE}.parsed_stream:make_parser",
            ),
            Function(
                "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat._create_chat_logprobs",
                "a324767e69e3",
                f"{_HERE}.parsed_stream:create_chat_logprobs",
            ),
            Function(
                "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
                "c1996c089597",
                changed={"0.33.0": "69495145508e"},
                via="serve.vllm_backend.output_processor",
            ),
        ),
        needs=("fast-stream",),
        process="server",
    ),
    Patch(
        "fork-server",
        "speed",
        "each process imports vLLM for itself, one after the other",
        (
            Function(
                "vllm.utils.system_utils:get_mp_context",
                "f8b42014f766",
                changed={"0.33.0": "cdd3f6fe0576"},
                via="serve.vllm_backend.forkserver",
            ),
        ),
        on="cpu",
    ),
    Patch(
        "titles",
        "speed",
        "nothing of a process's title says whose it is; a fork server's children would look for it in all modules",
        (
            Function(
                "vllm.utils.system_utils:set_process_title", "d29c5431b9a2", via="serve.vllm_backend.patches.titles"
            ),
        ),
    ),
    Patch(
        "prompt-budget",
        "speed",
        "prompts of some thousand tokens take seconds of a CPU, in one step that everybody waits for",
        (
            Function(
                f"{_SCHEDULER}.schedule",
                "8c0986d6ba61",
                f"{_CPU}.prompt_budget:schedule",
                changed={"0.33.0": "5c13517ad2bd"},
                via="scheduler",
            ),
            Function(
                f"{_SCHEDULER}.update_from_output",
                "6b2096a3bf8a",
                f"{_CPU}.prompt_budget:update_from_output",
                changed={"0.33.0": "11afaac0e0ad"},
                via="scheduler",
            ),
            Function(f"{_SCHEDULER}.add_request", "8b558a7822ac", f"{_CPU}.prompt_budget:add_request", via="scheduler"),
        ),
        on="cpu",
    ),
)

KERNELS: tuple[Patch, ...] = (
    Patch(
        "lora-kernels",
        "speed",
        "the platform names the class that computes adapters; no hook tells that the layers with adapters are there, "
        "or that an adapter was copied into a slot",
        (
            Function(f"{_PLATFORM}.get_punica_wrapper", "d9b0d6fa3718", f"{_CPU}.install:get_punica_wrapper"),
            Function(
                f"{_MANAGER}._create_lora_modules",
                "7ee1f37a1ae9",
                f"{_CPU}.punica:create_lora_modules",
                changed={"0.33.0": "fae639b35fca"},
            ),
            Function(
                f"{_MANAGER}.activate_adapter",
                "9af4a771efed",
                f"{_CPU}.punica:activate_adapter",
                changed={"0.33.0": "102e605e4481"},
            ),
        ),
        on="cpu",
        wanted=(_LORA_KERNELS, frozenset({"auto", "layers", "compile"})),
    ),
    Patch(
        "lora-compile",
        "speed",
        "it turns torch.compile off where there are adapters, which its own LoRA path needs and ours does not",
        (
            Function(
                f"{_PLATFORM}.check_and_update_config",
                "8bf97679ab88",
                f"{_CPU}.install:check_and_update_config",
                changed={"0.33.0": "41e877f9913c"},
            ),
        ),
        needs=("lora-kernels",),
        on="cpu",
        wanted=(_LORA_KERNELS, frozenset({"compile"})),
    ),
    Patch(
        "fused-step",
        "speed",
        "a whole step is computed in one call, by weights that are packed in place of vLLM's while they are read",
        (
            Function(
                "vllm.model_executor.model_loader.base_loader:BaseModelLoader.create_model",
                "4b003a4a9df6",
                f"{_CPU}.step:create_model",
            ),
            Function(f"{_EMBEDDING}.process_weights_after_loading", "6cb95f076c74", via=f"{_CPU}.step"),
            Function(f"{_EMBEDDING}.embedding", "7b60af8bf444", via=f"{_CPU}.step"),
            Function(
                f"{_LAYERS}.linear:UnquantizedLinearMethod.process_weights_after_loading",
                "0e5b51f9f792",
                changed={"0.33.0": "72e376782ba9"},
                via=f"{_CPU}.step",
            ),
            Function("vllm.v1.sample.sampler:Sampler.greedy_sample", "87896ab5191f", via=f"{_CPU}.step"),
            Function(
                f"{_LINEAR}.scaled_mm.cpu:CPUInt8ScaledMMLinearKernel.process_weights_after_loading",
                "3386062e2049",
                f"{_CPU}.step:process_int8_weights_after_loading",
            ),
            Function(
                f"{_LINEAR}.mixed_precision.cpu:CPUWNA16LinearKernel.process_weights_after_loading",
                "9d260e658853",
                f"{_CPU}.step:process_integers_after_loading",
            ),
            Function(
                f"{_LINEAR}.scaled_mm.ScaledMMLinearKernel:FP8ScaledMMLinearKernel.process_weights_after_loading",
                "54a91e6bd757",
                f"{_CPU}.step:process_float8_after_loading",
            ),
            Function("vllm.v1.attention.backends.cpu_attn:_get_attn_isa", "aeffbd313aee", via=f"{_CPU}.step"),
            Function(f"{_CPU_RUNNER}.load_model", "84897512179a", f"{_CPU}.step:load_model", via="runner"),
            Function(f"{_CPU_RUNNER}._model_forward", "b13203711e7b", f"{_CPU}.step:model_forward", via="runner"),
        ),
        needs=("lora-kernels",),
        on="cpu",
        wanted=(_LORA_KERNELS, frozenset({"auto"})),
    ),
    Patch(
        "between-steps",
        "speed",
        "what vLLM does around a step of a few tokens wakes up threads, or copies tensors onto themselves",
        (
            Function(
                "vllm.v1.worker.block_table:BlockTable.compute_slot_mapping",
                "d61d77af3838",
                f"{_CPU}.between_steps:compute_slot_mapping",
            ),
            Function("vllm.v1.utils:CpuGpuBuffer.copy_to_gpu", "81b415a543a3", f"{_CPU}.between_steps:copy_to_gpu"),
        ),
        needs=("fused-step",),
        on="cpu",
        wanted=(_LORA_KERNELS, frozenset({"auto"})),
    ),
    Patch(
        "speculation",
        "speed",
        "drafts are the scheduler's to take, and without speculative_config nobody proposes any, or verifies them",
        (
            Function(f"{_CPU_RUNNER}.load_model", "84897512179a", f"{_CPU}.verification:load_model", via="runner"),
            Function(
                f"{_GPU_RUNNER}._prepare_inputs", "516f544b3914", f"{_CPU}.verification:prepare_inputs", via="runner"
            ),
            Function(
                f"{_SCHEDULER}.schedule",
                "8c0986d6ba61",
                f"{_CPU}.speculation:schedule",
                changed={"0.33.0": "5c13517ad2bd"},
                via="scheduler",
            ),
            Function(
                f"{_SCHEDULER}.update_from_output",
                "6b2096a3bf8a",
                f"{_CPU}.speculation:update_from_output",
                changed={"0.33.0": "11afaac0e0ad"},
                via="scheduler",
            ),
            Function(
                f"{_SCHEDULER}.make_spec_decoding_stats",
                "3c6f5a075338",
                f"{_CPU}.speculation:make_spec_decoding_stats",
                via="scheduler",
            ),
        ),
        # Its drafts are put before the scheduler over what cuts prompts, and verified in one call.
        needs=("prompt-budget", "fused-step"),
        on="cpu",
        wanted=("LORADOCK_SPECULATION", frozenset({"ngram"})),
    ),
)

# In the order in which they are applied: a later one gets the replacement of an earlier one.
PATCHES: tuple[Patch, ...] = (*CORRECTNESS, *SECURITY, *SPEED, *KERNELS)

# How subclasses of ours are handed to vLLM, by the `via` of the functions that are in them.
HOOKS: Mapping[str, Function] = {
    "scheduler": Function(
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
        "3e1036150d51",
        f"{_HERE}.patches.classes:get_scheduler_cls",
    ),
    "runner": Function(
        "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
        "278277239a91",
        f"{_HERE}.patches.classes:init_device",
    ),
}


_BY_NAME = {patch.name: patch for patch in PATCHES}


def named(name: str) -> Patch:
    """A patch by its name, or KeyError."""
    return _BY_NAME[name]


def defaults() -> dict[str, str]:
    """What the settings of the environment are where nobody set them."""
    return {_LORA_KERNELS: "auto", "LORADOCK_SPECULATION": "off"}
