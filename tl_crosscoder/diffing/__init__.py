"""The whole job: from two models and some text to a verdict, in one folder."""
