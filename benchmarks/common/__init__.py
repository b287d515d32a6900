"""What the questions share: data, training, measuring, statistics, pictures, saved results."""
