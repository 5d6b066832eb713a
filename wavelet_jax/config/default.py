"""Every key of every run, with what it means. The files in configs/ change some of them.

The code never supplies a default: what a run does is what its config says, and `workdir/config.json` keeps it.
"""

from ml_collections import ConfigDict

from wavelet_jax import positions
from wavelet_jax.config import upgrade


def get_config(method: str = "wavelet") -> ConfigDict:
    """The config of a small model with one position method and its options; raises `UserError` for an unknown one."""
    config = ConfigDict()
    config.config_version = upgrade.VERSION  # of the layout of these keys; see wavelet_jax/config/upgrade.py

    # --- Text -> tokens ------------------------------------------------------------------------------------------
    config.data = data = ConfigDict()
    data.source = "python"  # python: the interpreter's standard library | text: files | jsonl: JSON lines | tfds:NAME
    data.folder = ""  # where relative paths of this section start; train.py fills in the folder that it is started in
    data.train_files = ""  # text and jsonl: paths and globs, comma-separated; plain, .gz or .xz
    data.validation_files = ""  # the same; empty: documents are taken out of train_files
    data.text_field = "text"  # jsonl, tfds: the field that holds the text; "book_text" in tfds:pg19
    data.validation_text_field = ""  # jsonl: the field in validation_files; empty: the same
    data.missing_text = "error"  # jsonl: of a record without that field, or with null in it: error | skip (counted)
    data.document = "file"  # text: what is one document: file | line | paragraph (between blank lines)
    data.tfds_dir = "~/tensorflow_datasets"  # tfds: where data sets have been prepared, as array_record files
    data.train_split = "train"  # tfds: a split, or parts of some: "train[:90%]"
    data.validation_split = "validation"  # tfds: the same; empty: documents are taken out of train_split
    data.validation_fraction = 0.05  # of the documents, by a hash of their content; without a validation text
    data.tokenizer = "byte"  # byte | word (WikiText's convention) | bpe (trained on the training text) | sentencepiece
    data.tokenizer_file = ""  # sentencepiece: the model, such as Llama's tokenizer.model
    data.vocab_size = 0  # word: the most frequent kept, 0 for all; bpe: the size to train; sentencepiece: 0
    data.cache_dir = "~/.cache/wavelet_jax"  # tokenized corpora, shared by runs
    data.packing = "none"  # none: attention crosses the ends of documents | documents: it stays inside each one
    data.seed = 0  # seed of the order of training windows
    data.threads = 8  # threads that read TFDS records and tokenize
    data.prefetch = 2  # batches prepared ahead of the update that uses them; 0: none

    # --- The decoder: dimensions E, H, K, D, F of model/decoder.py --------------------------------------------------
    config.model = model = ConfigDict()
    model.num_layers = 4  # blocks
    model.d_model = 128  # E
    model.num_heads = 4  # H, query heads
    model.num_kv_heads = 4  # K, key and value heads; divides H (grouped queries)
    model.head_dim = 32  # D
    model.d_ff = 344  # F; about 8/3 E for swiglu, 4 E for relu
    model.norm = "rms"  # rms | layer
    model.activation = "swiglu"  # swiglu | relu
    model.use_bias = False  # in the linear layers
    model.final_norm = True  # a norm before the head
    model.tied_head = True  # the head is the embedding's transpose; adaptive: always
    model.vocabulary = "full"  # full: embeddings of E numbers | adaptive: rarer words get narrower ones
    model.cutoffs = ()  # adaptive: the first word of each further cluster, such as (20000, 60000)
    model.adaptive_factor = 4  # adaptive: each further cluster is narrower by this factor
    model.adaptive_dropout = 0.0  # adaptive: on the input of the softmax, and inside its tails
    model.scale_embedding = False  # embeddings, N(0, E^-1/2), are multiplied by sqrt(E)
    model.initializer = "fan_in"  # of the linear layers: fan_in: N(0, 1/fan_in) | xavier: uniform
    model.dropout = 0.0  # on embeddings and residual branches
    model.attention_dropout = 0.0  # on attention probabilities
    model.activation_dropout = 0.0  # inside the feed-forward
    model.dtype = "float32"  # of activations: float32 | bfloat16; parameters are float32
    # Precision of products of float32 activations with parameters: highest (float32 on every device) | high (three
    # bfloat16 products on a TPU) | default (the device's fastest: bfloat16 on TPUs, TF32 on GPUs). Attention's own
    # products of float32 numbers are always of the highest. On CPUs, and in bfloat16, all three are the same.
    model.precision = "highest"  # highest | high | default
    # Rematerialization: what each block saves for the backward pass, which recomputes the rest. none: everything; dots:
    # outputs of matrix products and of attention; attention: outputs of attention only; block: nothing.
    model.remat = "none"  # none | dots | attention | block, from most memory to least
    # A scan over layers is one compiled block in a loop, and compiles in the time of one layer; layers compiled one by
    # one may run faster. Checkpoints of one form are read by the other. auto: a scan from 8 layers on.
    model.scan_layers = "auto"  # auto | always | never
    model.attention_backend = "auto"  # auto, or one of wavelet_jax.attention.BACKENDS

    # --- Position: the method and its own options, which are fields of its class in wavelet_jax/positions/ -----------
    config.position = ConfigDict(positions.config(method))

    # --- Training --------------------------------------------------------------------------------------------------
    config.train = train = ConfigDict()
    train.steps = 1000  # optimizer updates
    train.model_seed = 0  # seed of parameters and dropout; all seeds are below 2^32
    train.init_from = ""  # another run's directory: begin with its parameters; see wavelet_jax/training/initial.py
    train.length = 128  # tokens in a window, L_train
    train.batch_size = 32  # windows per update, over all devices and accumulation steps
    train.accumulation = 1  # parts of an update that are computed one after another, to save memory
    train.logits_chunk = 4096  # tokens whose logits are in memory at a time; 0: all
    train.skip_nonfinite = 0  # updates in a row that may be skipped because loss or gradient is not finite

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw | nag: Nesterov's momentum as fairseq has it (wavelet_jax/training/nag.py)
    optimizer.learning_rate = 2e-3  # the peak
    optimizer.schedule = "cosine"  # after the warm-up: cosine | linear | constant
    optimizer.warmup_steps = 100  # linear from warmup_start
    optimizer.warmup_start = 0.0  # initial learning rate; 0: peak / (warmup_steps + 1), so that no update is lost
    optimizer.decay_steps = train.get_oneway_ref("steps")  # cosine, linear: end of the decay; set it to prolong a run
    optimizer.final_fraction = 0.1  # cosine, linear: final learning rate as a fraction of the peak
    optimizer.b1 = 0.9  # adamw: decay of the first moment
    optimizer.b2 = 0.95  # adamw: decay of the second moment
    optimizer.eps = 1e-8  # adamw: added to the second moment's root
    optimizer.weight_decay = 0.1  # adamw: on matrices; not on norms, biases and position parameters
    optimizer.momentum = 0.99  # nag
    optimizer.clip_norm = 1.0  # global gradient norm to clip at, of the mean loss over tokens; 0: no clipping

    # --- What a run writes ------------------------------------------------------------------------------------------
    config.log = log = ConfigDict()
    log.every = 20  # updates
    log.wandb = ""  # a project of Weights & Biases to log to as well (pip install 'wavelet-jax[wandb]'); empty: none
    log.slow_update = 10.0  # warn if an update takes this many times the median of the last 32; 0: never
    log.slow_seconds = 10.0  # and at least these seconds
    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 500  # updates; the last is always saved
    checkpoint.keep = 2  # newest checkpoints
    checkpoint.timeout = 600  # seconds after which a save is abandoned, for example one that failed in another process
    config.eval = evaluation = ConfigDict()
    evaluation.every = 500  # updates between validations during training; 0: none
    evaluation.windows = 128  # validation windows in each
    # eval.py, and the end of a comparison:
    evaluation.max_tokens = 65536  # validation tokens scored at every length, from the first one; 0: all that fit
    evaluation.sequences = 0  # if > 0: score this many randomly drawn sequences of the longest length instead
    evaluation.sequence_seed = 0  # seed of the draw
    evaluation.batch_tokens = 8192  # tokens of a batch; at least one block
    evaluation.prefill_chunk = 4096  # longer blocks are read in chunks of this many tokens, to save memory; 0: whole
    evaluation.resamples = 1000  # bootstrap resamples of the 95% intervals
    evaluation.bootstrap_seed = 0  # seed of the resamples

    # --- Evaluators during training: one section each, by any name; see wavelet_jax/training/evaluators.py ------------
    config.evaluators = evaluators = ConfigDict()
    evaluators.validation = ConfigDict(
        {
            "type": "loss",  # on the first windows of the validation text; NAME_loss in the metrics
            "every": evaluation.get_oneway_ref("every"),  # updates; 0: never
            "windows": evaluation.get_oneway_ref("windows"),
            "length": train.get_oneway_ref("length"),  # tokens in a window
        }
    )

    # --- Devices: sizes of the mesh axes; -1 once for "the rest" ------------------------------------------------------
    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # batches are split over data and fsdp
    mesh.fsdp = 1  # parameters and optimizer state too
    mesh.context = 1  # sequences are split over it; train.length is a multiple of twice its size
    mesh.tensor = 1  # heads and the feed-forward's width are split over it

    # --- A comparison: several runs one after another, then evaluation and figures; empty: one run -----------------
    config.compare = compare = ConfigDict()
    compare.variants = ()  # of the config's file, as in FILE.py:VARIANT; each is a run in a folder of that name
    compare.label = ""  # what tables and figures call this run; empty: position.method
    compare.lengths = (128, 256, 512, 1024)  # tokens
    compare.protocol = "full_length"  # full_length | non_overlapping | sliding_window

    config.lock()  # a misspelled key is an error, also in the files that change some of these
    config.evaluators.unlock()  # more of them may be added
    return config


def set_position(config: ConfigDict, **options: object) -> None:
    """Sets those of the options that the config's position method has, for configs with a variant per method.

    Raises:
      UserError: an option that no method has.
    """
    method = config.position.method
    for option, value in options.items():
        if option in config.position:
            config.position[option] = value
        elif not any(option in positions.config(other) for other in positions.METHODS):
            raise positions.unknown_option(method, option)
