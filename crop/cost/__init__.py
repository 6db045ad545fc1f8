"""What a prefill costs, with and without a method, before anything runs."""
