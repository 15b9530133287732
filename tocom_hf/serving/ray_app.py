# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The service on Ray Serve: replicas on one machine or many, each at the degree that its own queue asks for.

    pip install 'tocom-hf[ray]'
    serve run tocom_hf.serving.ray_app:app model_name_or_path=deit-food101 plugins=tocom-deit-base
    curl --data-binary @image.png -H 'Content-Type: image/png' http://127.0.0.1:8000/predict

Settings are arguments, or environment variables such as `TOCOM_MODEL_NAME_OR_PATH`, after which
`serve run tocom_hf.serving.ray_app:app` is all that there is to type. `DeploymentSettings` lists them.
"""

from collections.abc import Mapping
from typing import Any

from tocom_hf.extras import require_extras


# A replica refuses what it cannot answer in time itself, by the images in its queue. These are beyond any such queue,
# so that the policy sees all that waits; Ray's default of 5 would keep the queue where no policy sees it.
_ONGOING_IN_A_REPLICA, _ONGOING_IN_A_GATEWAY = 1_000, 10_000


def app(arguments: Mapping[str, Any]) -> Any:
    """Build the application, for `serve run`, `serve build`, `serve deploy` and `serve.run(app({...}))`.

    Args:
        arguments: Settings by their names, as in `DeploymentSettings`; text is converted.

    Returns:
        The `ray.serve.Application`.

    Raises:
        ArgumentError: if a setting is unknown, missing or out of range.
        MissingExtraError: if Ray is not installed.
    """
    with require_extras("tocom_hf.serving.ray_app"):
        from ray import serve

        from tocom_hf.serving.ray_deployments import Classifier, Gateway
        from tocom_hf.serving.settings import from_arguments
    settings = from_arguments(arguments)
    replicas: dict[str, Any] = {"num_replicas": settings.num_replicas}
    if settings.max_replicas is not None:
        # A full batch for each replica is what its smallest degree is meant for. What is more raises the degree at
        # once, and adds a replica if it lasts.
        replicas = {
            "autoscaling_config": {
                "min_replicas": settings.num_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.max_batch_size,
            }
        }
    classifier = serve.deployment(Classifier).options(
        **replicas,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        max_ongoing_requests=_ONGOING_IN_A_REPLICA,
        max_queued_requests=settings.max_queued_requests,
        # how soon Ray notices a replica that has died and starts another one
        health_check_period_s=2,
        user_config={},
    )
    gateway = serve.deployment(serve.ingress()(Gateway)).options(
        num_replicas=settings.gateways,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_ONGOING_IN_A_GATEWAY,
    )
    return gateway.bind(classifier.bind(settings.of_the_model().model_dump()))
