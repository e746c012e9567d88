"""One page per op: formula, reference, allocation, registration, autograd, public function."""
