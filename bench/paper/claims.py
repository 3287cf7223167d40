"""The paper's figures, and why ours differ; nothing here is measured by us."""

MEMORY_SAVED = {"16x1024": 0.381, "32x2048": 0.957}  # claimed against its BPE Conv1D and its Transformer
TABLE2: dict[str, dict[str, float | str]] = {  # its columns, by row
    "parameters": {"BPE Conv1D": "1,969,920", "Transformer": "1,776,640", "LSTM": "1,250,816", "FuzzyTok": "1,118,600"},
    "loss, nats a step of its own": {"BPE Conv1D": 2.1257, "Transformer": 2.4547, "LSTM": 2.2320, "FuzzyTok": "1.4110 (text: 0.4110)"},
    "perplexity": {"BPE Conv1D": 8.38, "Transformer": 11.64, "LSTM": 9.32, "FuzzyTok": 1.51},
    "MB at 16x1024": {"BPE Conv1D": 232.5, "Transformer": 763.8, "LSTM": 220.3, "FuzzyTok": 118.6},
    "MB at 32x2048": {"BPE Conv1D": 489.0, "Transformer": 9240.2, "LSTM": 573.1, "FuzzyTok": "118.6 (text: 392.7)"},
    "radical ratio": {"BPE Conv1D": 1.0917, "Transformer": 1.0524, "LSTM": 1.1186, "FuzzyTok": 1.1186},
    "causality": {"BPE Conv1D": "verified", "Transformer": "N/A", "LSTM": "N/A", "FuzzyTok": "verified"},
}
BPE_LOSS, LOSSES = 2.1257, (0.4110, 1.4110)
# The paper's figure, the key of ours beside it in `beside.py`, and why they differ or why the paper's cannot stand.
DEFECTS = (
    (
        "loss 0.4110 (abstract, text) and 1.4110 (its Table 2); perplexity 1.51; 80.7 % less than the BPE Conv1D",
        "losses",
        "Two losses for one run. The perplexity of 1.51 and the 80.7 % belong to 0.4110; 1.4110 would be a perplexity of 4.10. Neither is"
        " said to be of held-out text.",
    ),
    (
        "FuzzyTok's 1.4110 beside 2.1257, 2.2320 and 2.4547",
        "per_byte",
        "FuzzyTok's loss is of a byte and the others' of a BPE token, which stands for more than one byte: neither they nor their"
        " perplexities can be compared.",
    ),
    (
        "118.6 MB at 16 x 1024 and at 32 x 2048, 38.1 % and 95.7 % saved",
        "memory",
        "One figure for two shapes of which one has four times the bytes; the 38.1 % and 95.7 % imply 143.9 and 392.7 MB. Its"
        " Transformer's 9,240 MB are those of attention whose T x T scores are stored; ours is scaled_dot_product_attention.",
    ),
    (
        "receptive field 43 for two cycles of dilations 1, 2, 4 at K = 3",
        "fields",
        "By its own Eq. 4 two cycles give 29; 43 takes three.",
    ),
    (
        "radical ratio 1.1186 for FuzzyTok and for the LSTM; 1.0917 and 1.0524",
        "radical",
        "One figure for two models, in bold for the one that is not the paper's. The raw ratio says little: a bag of bytes, which learns"
        " nothing, has one too. See the centred gap and the AUC below.",
    ),
    ("causality 'N/A' for the Transformer and the LSTM", "causality", "They can be tested as any model can."),
    (
        "tiled kernel / naive: 1.54x, 2.15x, 2.26x, 4.46x",
        "table1",
        "It says neither what is timed nor at which number of channels, and has a forward kernel only. Ours is one convolution of 256"
        " channels.",
    ),
    (
        "the tensor cores of a T4",
        "tensor_cores",
        "Today's Triton compiles nothing for Turing's, and for fp32, in which the listing accumulates, Turing has none.",
    ),
    ("PyTorch 2.4 with CUDA 13.0", "versions", "PyTorch's builds for CUDA 13 begin with 2.9."),
    ("no baseline in cuDNN", "cudnn", "A speed-up over a kernel that spills its registers says little."),
    ("no corpus, split, seed, spread or held-out text: 'the same corpus', 40 epochs", "corpus", "Nobody can run it again."),
    (
        "32x less traffic",
        "traffic",
        "It counts x alone, and leaves out the weight, the K times that every tile is read, and the L2.",
    ),
    (
        "parameters 1,118,600 (FuzzyTok), 1,969,920, 1,250,816, 1,776,640",
        "parameters",
        "Its three baselines' fit two LSTM layers, nine convolutions and two Transformer layers of width 256, each over a vocabulary of 385"
        " with no bias in the head, where the text speaks of about 32,000. FuzzyTok's own fit no model of width 256 that the text"
        " describes. Our widths are matched by FLOPs a byte.",
    ),
)
