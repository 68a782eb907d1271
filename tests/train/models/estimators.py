from sklearn.linear_model import SGDClassifier


def linear() -> SGDClassifier:
    return SGDClassifier(loss="log_loss")


class Flat(SGDClassifier):
    """Takes images as they are."""

    def partial_fit(self, x, y, classes=None, sample_weight=None):  # type: ignore[no-untyped-def]
        return super().partial_fit(x.reshape(len(x), -1) / 255, y, classes)

    def predict(self, x):  # type: ignore[no-untyped-def]
        return super().predict(x.reshape(len(x), -1) / 255)
