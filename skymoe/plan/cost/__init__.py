"""The price list: seconds of every half layer, of the ends of the model, of a hop and of a step's end."""
