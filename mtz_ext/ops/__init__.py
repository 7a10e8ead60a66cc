"""One file an operator: its schema, its checks, its fake, its implementation, and the public function."""
