"""A stand-in for MedGemma that the real vLLM engine serves in seconds: the same classes at toy size, with random ("dummy") weights.

The directory holds a configuration, a byte-level tokenizer trained on the spot and the image processor; no weights, so serve it with
`load_format="dummy"`. What it answers is noise that follows the JSON schema: it exercises the machinery, never the quality of names.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

ENGINE = {
    "dtype": "bfloat16",
    "load_format": "dummy",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "enforce_eager": True,
}
"""Engine arguments for this directory on a CPU."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The first request for log-probabilities compiles a kernel of the sampler: 20 s on two cores.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Environment of the engine's processes on a small machine."""

_NEWLINES = ["\n" * n for n in range(1, 5)]
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]

_TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}\
{% if item['type'] == 'image' %}<start_of_image>{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def write_tiny_gemma3(directory: Path, image_size: int = 56, hidden: int = 96, layers: int = 2) -> Path:
    """Writes the directory and returns it. `hidden` (a multiple of 32) and `layers` make it as heavy as a benchmark wants it.

    vLLM's dummy weights are tiny and the embedding is tied, so the model says over and over whichever allowed token lies nearest to the last one: answers
    follow the schema and name nothing.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Trained on the package's prompts and vocabularies, so that prompts and answers take about as many tokens a word as those of a real model.
    package = resources.files("medsae.naming")
    corpus = [f.read_text("utf-8") for folder in ("prompts", "vocabularies") for f in sorted((package / folder).iterdir(), key=lambda f: f.name)]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in _NEWLINES])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        chat_template=_TEMPLATE,
    )
    ids = {t: fast.convert_tokens_to_ids(t) for t in _SPECIAL}
    tokens_per_image = 4
    config = Gemma3Config(
        text_config={
            "vocab_size": len(fast),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 8192,
            "sliding_window": 1024,
            "pad_token_id": ids["<pad>"],
            "eos_token_id": ids["<eos>"],
            "bos_token_id": ids["<bos>"],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": image_size,
            "patch_size": 14,
        },
        mm_tokens_per_image=tokens_per_image,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        eos_token_id=[ids["<eos>"], ids["<end_of_turn>"]],
    )
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(directory)
    images = Gemma3ImageProcessor(
        size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2, do_pan_and_scan=False
    )
    Gemma3Processor(images, fast, image_seq_length=tokens_per_image, chat_template=_TEMPLATE).save_pretrained(directory)
    return directory
