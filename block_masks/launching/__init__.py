"""How ops and kernels are launched: on the device of their tensors, and with little work for the host."""
