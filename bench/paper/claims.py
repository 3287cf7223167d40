"""The paper's figures, and what is wrong with them; nothing here is measured by us."""

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
# What is wrong, and the key of our figure beside it in `report.beside`.
DEFECTS = (
    (
        "Two losses for one run: 0.4110 in the abstract and the text, 1.4110 in Table 2. The perplexity of 1.51 and the 80.7 % belong to"
        " 0.4110; 1.4110 would be a perplexity of 4.10.",
        "losses",
    ),
    (
        "FuzzyTok's loss is of a byte and the others' of a BPE token, which stands for more than one byte: neither they nor their"
        " perplexities can be compared.",
        "per_byte",
    ),
    (
        "One memory figure, 118.6 MB, for two shapes of which one has four times the bytes; the text's 38.1 % and 95.7 % imply 143.9 and"
        " 392.7 MB.",
        "memory",
    ),
    (
        "A receptive field of 43 for two cycles of dilations 1, 2, 4 at K = 3. By its own Eq. 4 two cycles give 29; 43 takes three.",
        "fields",
    ),
    ("One radical ratio, 1.1186, printed for two models, in bold for the one that is not the paper's.", "radical"),
    ("Causality 'N/A' for the Transformer and the LSTM, which can be tested as any model can.", "causality"),
    ("Table 1 says neither what is timed nor at which number of channels; the paper shows a forward kernel only.", "table1"),
    (
        "The tensor cores of a T4: today's Triton compiles nothing for Turing's, and for fp32, in which the listing accumulates, Turing has"
        " none.",
        "tensor_cores",
    ),
    ("PyTorch 2.4 with CUDA 13.0: PyTorch's builds for CUDA 13 begin with 2.9.", "versions"),
    ("No baseline in cuDNN for the kernel: a speed-up over a kernel that spills its registers says little.", "cudnn"),
    ("No corpus, no split, no seed, no spread, no held-out text: 'the same corpus', and 40 epochs of it.", "corpus"),
    ("'32x' less traffic leaves out the weight, the K times that every tile is read, and the L2.", "traffic"),
    (
        "The parameters of its three baselines fit two LSTM layers, nine convolutions and two Transformer layers of width 256, each over a"
        " vocabulary of 385 with no bias in the head, where the text speaks of about 32,000. FuzzyTok's own 1,118,600 fit no model of"
        " width 256 that the text describes.",
        "parameters",
    ),
)
