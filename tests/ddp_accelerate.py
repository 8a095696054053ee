"""examples/accelerate_loop.py on the ranks of a process group. Each prints JSON: its rank and the weights afterwards.

Run by tests/examples/test_examples.py. Without mixup, which pairs images of one process.
"""

import json

import accelerate
from example_programs import EXACT_COEFS, load_example, weights

from utils import joined_world

if __name__ == "__main__":
    example = load_example("accelerate_loop")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of the process that forked this one
    with joined_world("cpu", "env://") as world:
        found = weights(example.main(epochs=1, batch=8, coefs=EXACT_COEFS, mixup=False, cpu=True))
        assert accelerate.state.AcceleratorState().num_processes == world.size
        print(json.dumps({"rank": world.rank, "weights": found.double().tolist()}), flush=True)
