"""llama.cpp's forward, timed: one line of JSON in, one line out.

The calls are those of llama.h: a batch of tokens, decoded. Prompts go in batches of 512, which is llama.cpp's default; decoding
is one token per call and the greedy choice of the next. Flash attention is on: it is the faster of its two ways on a CPU.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy

BATCH = 512


def main(path, threads, tokens_max):
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = tokens_max
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = threads
    if hasattr(params, "flash_attn_type"):
        params.flash_attn_type = 1
    elif hasattr(params, "flash_attn"):
        params.flash_attn = True
    context = llama_cpp.llama_init_from_model(model, params)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    memory = llama_cpp.llama_get_memory(context)

    def feed(tokens):
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            ids = (llama_cpp.llama_token * len(part))(*part)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(part))) != 0:
                sys.exit("llama_decode failed")

    def greedy():
        logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(vocab,))
        return int(logits.argmax())

    system = llama_cpp.llama_print_system_info().decode().strip()
    say({"version": f"llama-cpp-python {llama_cpp.__version__}; {system}"})
    for line in sys.stdin:
        question = json.loads(line)
        llama_cpp.llama_memory_clear(memory, True)
        feed(question["context"])
        timed = question["timed"]
        begun = time.perf_counter()
        if question["decode"]:
            token = timed[0]
            for _ in timed:
                feed([token])
                token = greedy()
        else:
            feed(timed)
            greedy()
        say({"seconds": time.perf_counter() - begun})


def say(answer):
    print(json.dumps(answer), flush=True)


main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
