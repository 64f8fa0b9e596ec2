"""The network: a private subnet in each zone, public ones where the front is, ways out, and endpoints of AWS inside."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import pulumi_aws as aws

from infra.plan.aws import INTERFACES
from infra.targets.aws.site import Part, Site, allow, policy, trust

FLOW_LOG_DAYS = 30
ANYWHERE = "0.0.0.0/0"


@dataclass(frozen=True)
class Place:
    """Where machines are put."""

    vpc: pulumi.Input[str]
    cidr: pulumi.Input[str]
    private: dict[str, pulumi.Input[str]]
    """Subnets by zone; those of a VPC that is there already by their own ids."""
    public: dict[str, pulumi.Input[str]]
    """In the zones of the gateways: for a public load balancer, and the way out."""
    routes: tuple[pulumi.Input[str], ...]
    """Route tables of the private subnets that are made."""

    def subnets(self, zones: tuple[str, ...]) -> list[pulumi.Input[str]]:
        """The private subnets of zones; all, where nobody knows in which zones they are."""
        return [self.private[zone] for zone in zones if zone in self.private] or list(self.private.values())


class Network(Part):
    """The VPC, made or found."""

    place: Place

    def __init__(self, name: str, site: Site) -> None:
        super().__init__("Network", name)
        plan = site.aws.network
        self.site, self.plan = site, plan
        self.place = self._found(plan.vpc) if plan.vpc else self._made()
        self.register_outputs({"vpc": self.place.vpc})

    def _found(self, vpc: str) -> Place:
        cidr = aws.ec2.get_vpc_output(id=vpc, opts=pulumi.InvokeOutputOptions(parent=self)).cidr_block
        return Place(vpc, cidr, {subnet: subnet for subnet in self.plan.subnets}, {}, ())

    def _made(self) -> Place:
        site = self.site
        vpc = aws.ec2.Vpc(
            "vpc",
            cidr_block=self.plan.cidr,
            enable_dns_support=True,
            enable_dns_hostnames=True,
            tags=site.named("network"),
            opts=self.within(),
        )
        # A machine that is put into no group by mistake reaches nothing and is reached by nothing.
        aws.ec2.DefaultSecurityGroup("default", vpc_id=vpc.id, tags=site.tags("network"), opts=self.within())
        private: dict[str, pulumi.Input[str]] = {}
        public: dict[str, pulumi.Input[str]] = {}
        for zone in self.plan.zones:
            for kind, subnets, cidr in (("private", private, zone.private), ("public", public, zone.public)):
                if kind == "public" and zone.zone not in site.aws.gateway.zones:
                    continue
                subnets[zone.zone] = aws.ec2.Subnet(
                    f"{kind}-{zone.zone}",
                    vpc_id=vpc.id,
                    cidr_block=cidr,
                    availability_zone_id=zone.zone,
                    map_public_ip_on_launch=False,
                    tags=site.named(f"{kind}-{zone.zone}"),
                    opts=self.within(),
                ).id
        routes = self._routes(vpc, private, public)
        if self.plan.flow_logs:
            self._flow_logs(vpc)
        return Place(vpc.id, vpc.cidr_block, private, public, (routes.id,))

    def _routes(
        self, vpc: aws.ec2.Vpc, private: dict[str, pulumi.Input[str]], public: dict[str, pulumi.Input[str]]
    ) -> aws.ec2.RouteTable:
        """Ways out. One NAT gateway: nodes need it to come up, not to serve, and one in each zone has its price."""
        site = self.site
        inside = aws.ec2.RouteTable("private", vpc_id=vpc.id, tags=site.named("private"), opts=self.within())
        tables = {"private": (inside, private)}
        if self.plan.internet == "nat" or site.aws.balancer.public:
            internet = aws.ec2.InternetGateway(
                "internet", vpc_id=vpc.id, tags=site.named("network"), opts=self.within()
            )
            outside = aws.ec2.RouteTable("public", vpc_id=vpc.id, tags=site.named("public"), opts=self.within())
            aws.ec2.Route(
                "public-out",
                route_table_id=outside.id,
                destination_cidr_block=ANYWHERE,
                gateway_id=internet.id,
                opts=self.within(),
            )
            tables["public"] = (outside, public)
            if self.plan.internet == "nat":
                self._nat(inside, next(iter(public.values())), internet)
        for kind, (table, subnets) in tables.items():
            for zone, subnet in subnets.items():
                aws.ec2.RouteTableAssociation(
                    f"{kind}-{zone}", subnet_id=subnet, route_table_id=table.id, opts=self.within()
                )
        return inside

    def _nat(self, inside: aws.ec2.RouteTable, subnet: pulumi.Input[str], internet: aws.ec2.InternetGateway) -> None:
        address = aws.ec2.Eip("nat", domain="vpc", tags=self.site.named("nat"), opts=self.within(depends_on=[internet]))
        nat = aws.ec2.NatGateway(
            "nat",
            allocation_id=address.id,
            subnet_id=subnet,
            tags=self.site.named("nat"),
            # It stays in the zone in which it was made when others are added before that.
            opts=self.within(depends_on=[internet], ignore_changes=["subnetId"]),
        )
        aws.ec2.Route(
            "private-out",
            route_table_id=inside.id,
            destination_cidr_block=ANYWHERE,
            nat_gateway_id=nat.id,
            opts=self.within(),
        )

    def _flow_logs(self, vpc: aws.ec2.Vpc) -> None:
        site = self.site
        group = aws.cloudwatch.LogGroup(
            "flow-logs",
            name=f"/vllm-fleet/{site.stack}/flow-logs",
            retention_in_days=FLOW_LOG_DAYS,
            tags=site.tags("network"),
            opts=self.within(),
        )
        role = aws.iam.Role(
            "flow-logs",
            path=site.path,
            assume_role_policy=trust("vpc-flow-logs"),
            permissions_boundary=site.aws.permissions_boundary,
            tags=site.tags("network"),
            opts=self.within(),
        )
        actions = ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"]
        aws.iam.RolePolicy(
            "flow-logs",
            role=role.id,
            policy=policy(allow(actions, [group.arn, pulumi.Output.concat(group.arn, ":*")])),
            opts=self.within(),
        )
        aws.ec2.FlowLog(
            "flow-logs",
            vpc_id=vpc.id,
            traffic_type="ALL",
            log_destination=group.arn,
            iam_role_arn=role.arn,
            tags=site.tags("network"),
            opts=self.within(),
        )

    def endpoints(self, group: pulumi.Input[str]) -> None:
        """Ways to the services of AWS that stay inside: to S3 always, as it costs nothing; to others where wanted.

        Args:
            group: Security group of the interfaces.
        """
        site, place = self.site, self.place
        if place.routes:
            aws.ec2.VpcEndpoint(
                "s3",
                vpc_id=place.vpc,
                service_name=f"com.amazonaws.{site.region}.s3",
                vpc_endpoint_type="Gateway",
                route_table_ids=list(place.routes),
                tags=site.named("s3"),
                opts=self.within(),
            )
        if not self.plan.interface_endpoints:
            return
        for service in INTERFACES:
            aws.ec2.VpcEndpoint(
                service,
                vpc_id=place.vpc,
                service_name=f"com.amazonaws.{site.region}.{service}",
                vpc_endpoint_type="Interface",
                # Each has its price in each zone; machines in the others find their way there too.
                subnet_ids=place.subnets(site.aws.gateway.zones),
                security_group_ids=[group],
                private_dns_enabled=True,
                tags=site.named(service),
                opts=self.within(),
            )
