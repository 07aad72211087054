"""The upcycle job: dense models into a mixture of experts, or a mixture into a larger one, with a receipt."""
