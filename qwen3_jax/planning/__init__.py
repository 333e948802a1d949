"""What a run on a pod would need and take, from its compiled programs, before a pod is rented."""
