"""Drop-in modules: same constructors, parameters and state_dict as the torch.nn modules they replace."""
