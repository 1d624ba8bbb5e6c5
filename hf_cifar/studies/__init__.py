"""Many runs: one recipe with several seeds, and a run made again."""
