"""Faults in the encoder that talks to MLX: ``(name, find, replace, seen_by)``."""

from .mutant import Mutant

_FAULTS = [
    (
        "a command buffer is committed inside a node",
        "  concurrent_.reset();\n",
        "  concurrent_.reset();\n  encoder_.end_encoding();\n  encoder_.commit();\n",
        "one command buffer",
    ),
    (
        "dispatches run at once for ever, with no barrier before the merge",
        "  concurrent_.reset();\n",
        "",
        "one command buffer",
    ),
    (
        "who reads pages is no output, so that no fence holds the next writer",
        "  encoder_.register_output_array(view);\n",
        "",
        "a command buffer for each node",
    ),
    (
        "written pages are registered as an input alone",
        "  encoder_.set_output_array(view, index);\n",
        "  encoder_.set_input_array(view, index);\n",
        "one command buffer",
    ),
    (
        "an output is registered as an input",
        "  encoder_.set_output_array(output, index);\n",
        "  encoder_.set_input_array(output, index);\n",
        "one command buffer",
    ),
    (
        "scratch memory is dropped with the node",
        "  encoder_.add_temporary(temporaries_.back());\n",
        "",
        "one command buffer",
    ),
    (
        "a pipeline is used that nobody made",
        "    return pipeline;\n  });\n",
        "    return decltype(pipeline)();\n  });\n",
        "one command buffer",
    ),
    (
        "long work counts for nothing, so that no command buffer is committed",
        "  added_elements_ = size_t(share * double((megabytes + 1) << 20));\n",
        "  added_elements_ = size_t(share * double(megabytes));\n",
        "long work",
    ),
]

MUTANTS = [
    Mutant(f"mlx_encoder: {name}", "contract", "csrc/metal/mlx_encoder.cpp", find, replace, seen_by)
    for name, find, replace, seen_by in _FAULTS
]
