"""What training needs around a loss: experience, the learner, the loop of steps."""
