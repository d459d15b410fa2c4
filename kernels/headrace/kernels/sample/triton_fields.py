# mypy: ignore-errors
"""What the sampling kernels share: the fields of `device.py` and the planes of the workspace.

The workspace is float32. Five planes of [S, NUM_CHUNKS] hold what the scan finds in each chunk of CHUNK logits of a
row; then one value per row of [S] each: the token chosen in mode "select", and the log of the sum of exponentials;
then the logits that entries replace, [E + S]. Integers are kept as their bits.
"""

import triton
import triton.language as tl
from headrace.kernels.sample.device import FIELDS, IS_BANNED, IS_SEEN, MODES

CHUNK = 2048

NUM_FIELDS = tl.constexpr(len(FIELDS))
MODE = tl.constexpr(FIELDS.index("mode"))
TARGET = tl.constexpr(FIELDS.index("target"))
TEMPERATURE = tl.constexpr(FIELDS.index("temperature"))
TOP_K = tl.constexpr(FIELDS.index("top_k"))
TOP_P = tl.constexpr(FIELDS.index("top_p"))
LOG_MIN_P = tl.constexpr(FIELDS.index("log_min_p"))
REPETITION = tl.constexpr(FIELDS.index("repetition"))
PRESENCE = tl.constexpr(FIELDS.index("presence"))
FREQUENCY = tl.constexpr(FIELDS.index("frequency"))
SEED_LOW = tl.constexpr(FIELDS.index("seed_low"))
SEED_HIGH = tl.constexpr(FIELDS.index("seed_high"))
POSITION = tl.constexpr(FIELDS.index("position"))
NUM_TOP = tl.constexpr(FIELDS.index("num_top"))
WANTS_LOGPROB = tl.constexpr(FIELDS.index("wants_logprob"))
FIRST_ENTRY = tl.constexpr(FIELDS.index("first_entry"))
LAST_ENTRY = tl.constexpr(FIELDS.index("last_entry"))
PENDING = tl.constexpr(FIELDS.index("pending"))

BEST = tl.constexpr(MODES.index("best"))
DRAW = tl.constexpr(MODES.index("draw"))
SELECT = tl.constexpr(MODES.index("select"))
SCORE = tl.constexpr(MODES.index("score"))

SEEN_FLAG = tl.constexpr(IS_SEEN)
BANNED_FLAG = tl.constexpr(IS_BANNED)

# Planes of [S, NUM_CHUNKS].
HIGHEST = tl.constexpr(0)  # NaN where a logit of the chunk is not finite
LOWEST = tl.constexpr(1)
SUM = tl.constexpr(2)  # of exp(logit - highest of the chunk)
VALUE = tl.constexpr(3)  # (logit - highest of the chunk) / temperature + noise of the winner
WINNER = tl.constexpr(4)  # id of the highest logit, or of the winner of the draw
NUM_PLANES = 5

MAX_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def int_field(rows, row, FIELD: tl.constexpr):
    return tl.load(rows + row * NUM_FIELDS + FIELD)


@triton.jit
def float_field(rows, row, FIELD: tl.constexpr):
    return tl.load(rows + row * NUM_FIELDS + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def plane(workspace, PLANE: tl.constexpr, row, num_rows, num_chunks):
    """Where the values of a row begin in a plane."""
    return workspace + (PLANE * num_rows + row) * num_chunks


@triton.jit
def as_id(value):
    """An int32 from float bits."""
    return value.to(tl.int32, bitcast=True)


@triton.jit
def as_bits(token_id):
    return token_id.to(tl.float32, bitcast=True)
