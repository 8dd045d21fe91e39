"""GPU kernels of mechanisms that libraries have none for."""
