// Logits of a GGUF model as llama.cpp computes them: windows of TOKENS token ids (int32) come in, and for each of them
// TOKENS rows of logits (float32) go out. Built against llama.cpp's own header by tests/campaigns/four_bits.py.
//
//     llama_logits MODEL.gguf TOKENS THREADS

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const int tokens = atoi(arguments[2]), threads = atoi(arguments[3]);
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(arguments[1], llama_model_default_params());
  if (!model) return fprintf(stderr, "llama.cpp does not load %s\n", arguments[1]), 1;
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = tokens;
  params.n_threads = params.n_threads_batch = threads;
  llama_context* context = llama_init_from_model(model, params);
  if (!context) return fprintf(stderr, "llama.cpp makes no context of %d tokens\n", tokens), 1;
  const size_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  std::vector<llama_token> window(tokens);
  llama_batch batch = llama_batch_init(tokens, 0, 1);
  while (fread(window.data(), sizeof(llama_token), tokens, stdin) == size_t(tokens)) {
    llama_memory_clear(llama_get_memory(context), true);
    batch.n_tokens = tokens;
    for (int at = 0; at < tokens; ++at) {
      batch.token[at] = window[at];
      batch.pos[at] = at;
      batch.n_seq_id[at] = 1;
      batch.seq_id[at][0] = 0;
      batch.logits[at] = true;
    }
    if (llama_decode(context, batch)) return fprintf(stderr, "llama_decode failed\n"), 1;
    for (int at = 0; at < tokens; ++at) fwrite(llama_get_logits_ith(context, at), sizeof(float), vocabulary, stdout);
    fflush(stdout);
  }
}
