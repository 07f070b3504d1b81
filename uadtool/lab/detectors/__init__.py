"""Detection methods: the contract, the registry, score statistics, teachers, one module per method."""
