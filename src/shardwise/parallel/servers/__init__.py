"""Parameter servers: processes that hold the parameters and run the optimizer, beside the workers that compute."""
