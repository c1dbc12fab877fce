"""Write a model as GGUF under the keys that llama.cpp's converter writes."""

import gguf

FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
QUANT_TYPES = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}


def add_hparams(writer, hp):
    writer.add_block_count(hp.n_layer)
    writer.add_context_length(hp.n_ctx_train)
    writer.add_embedding_length(hp.n_embd)
    writer.add_feed_forward_length(hp.n_ff)
    writer.add_head_count(hp.n_head)
    writer.add_head_count_kv(hp.n_head_kv)
    writer.add_layer_norm_rms_eps(hp.f_norm_rms_eps)
    writer.add_rope_dimension_count(hp.n_embd_head)
    writer.add_rope_freq_base(hp.rope_freq_base)
    writer.add_vocab_size(hp.n_vocab)


def add_vocab(writer, vocab):
    control = (vocab.bos, vocab.eos)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(vocab.tokens)
    writer.add_token_types([kinds[i in control] for i in range(len(vocab.tokens))])
    writer.add_token_merges([" ".join(pair) for pair in vocab.merges])
    writer.add_bos_token_id(vocab.bos)
    writer.add_eos_token_id(vocab.eos)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def write_gguf(path, name, model, vocab, file_type):
    """Write `model` to `path`: matrices in `file_type` ("f16" or "q8_0"), norms in F32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hparams(writer, model.hp)
    add_vocab(writer, vocab)
    for tensor_name, weight in model.state_dict().items():
        data = weight.numpy()
        if data.ndim == 1:
            writer.add_tensor(tensor_name, data)
        else:
            qtype = QUANT_TYPES[file_type]
            writer.add_tensor(tensor_name, gguf.quants.quantize(data, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
