"""Op: from logits to tokens and log-probabilities. `reference.py` (numpy alone) defines its meaning.

On the GPU: `device.py` holds the parameters of a step as tensors, `triton.py` launches the kernels. Importing this
package needs neither torch nor triton.
"""

from headrace.kernels.sample.reference import sample

__all__ = ["sample"]
